"""The container images that steps run in: what is in each, and how it is built, pushed and named by digest."""
