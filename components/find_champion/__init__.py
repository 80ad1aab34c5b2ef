"""The model a candidate has to beat."""
