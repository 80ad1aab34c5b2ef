"""Everything that crosses a wire between steps, and nothing that does work."""
