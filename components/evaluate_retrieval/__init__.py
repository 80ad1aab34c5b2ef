"""Retrieval arms on the same held-out questions, question by question."""
