"""The parts of the emulator: what SageMaker Pipelines does with a definition, on this machine."""
