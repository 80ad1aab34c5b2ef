"""A rubric-based judge, and how far it can be believed."""
