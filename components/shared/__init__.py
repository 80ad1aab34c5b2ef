"""Work that two or more components do."""
