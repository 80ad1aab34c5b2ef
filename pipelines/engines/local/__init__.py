"""The local engine: parallel, cached by content, resumable."""
