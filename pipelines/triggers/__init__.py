"""What starts a run without a person: a schedule, new data, CI, an event of the registry; each once."""
