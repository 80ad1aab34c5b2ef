"""The commands of `assay`, by noun: each parses, calls one function, and prints."""
