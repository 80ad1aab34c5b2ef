"""The compiled pipeline (KFP IR) as typed objects."""
