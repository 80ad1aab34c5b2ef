"""Distillation: a student learns a teacher's answers or its distributions."""
