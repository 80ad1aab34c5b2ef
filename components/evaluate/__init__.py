"""Every arm on the same held-out examples, example by example."""
