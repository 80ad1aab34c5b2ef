"""Tasks with a verifiable truth: their prompts, generators and verifiers."""
