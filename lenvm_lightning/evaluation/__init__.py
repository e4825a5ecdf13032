"""Measuring generators and length value models: one file a task."""
