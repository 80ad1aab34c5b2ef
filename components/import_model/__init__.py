"""A base model from a package, a folder, a hub, S3 or a registry."""
