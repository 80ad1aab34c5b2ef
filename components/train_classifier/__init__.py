"""A light classifier on the features of a frozen language model."""
