"""Accepted rows into leak-free splits."""
