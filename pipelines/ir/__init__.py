"""The compiled pipeline (KFP IR) as typed objects: its model, conditions, placeholders and values."""
