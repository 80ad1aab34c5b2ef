"""A gated version in MLflow, with its lineage."""
