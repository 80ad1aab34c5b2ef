"""Runs the compiled pipeline on a Kubeflow Pipelines server: deploy profile, compilation, submission, schedules."""
