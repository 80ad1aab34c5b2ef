"""Continued pre-training: a model learns a domain's language before it learns a task."""
