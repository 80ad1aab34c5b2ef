"""Preference pairs from scored candidates, edits and ratings."""
