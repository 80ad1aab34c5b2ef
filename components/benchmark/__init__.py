"""Third-party benchmarks, by lm-evaluation-harness."""
