"""Trainer, stages, gradient cache, parameter groups and checkpoints."""
