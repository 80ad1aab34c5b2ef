"""A stage must earn its place: the better of its input and its output."""
