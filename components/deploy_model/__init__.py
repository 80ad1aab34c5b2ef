"""Parity check, then the champion alias moves."""
