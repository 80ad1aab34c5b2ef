"""What turns a typed function into a step that every engine can run."""
