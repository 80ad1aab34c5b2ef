"""Which components run, in which order, on which engine."""
