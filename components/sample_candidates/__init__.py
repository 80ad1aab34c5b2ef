"""Several answers of a model to each prompt, scored by the verifier."""
