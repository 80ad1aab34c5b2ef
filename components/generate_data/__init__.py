"""Raw rows from a task's deterministic generator."""
