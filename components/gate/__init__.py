"""Promote, hold or inconclusive, from paired evidence."""
