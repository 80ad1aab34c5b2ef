"""Preference tuning (DPO) on pairs."""
