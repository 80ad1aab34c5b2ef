"""SageMaker Pipelines: the compiled graph translated to a pipeline definition, checked, submitted."""
