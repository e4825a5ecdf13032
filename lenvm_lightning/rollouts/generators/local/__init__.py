"""Completions from a transformers model in this process."""

from .generator import LocalGenerator

__all__ = ["LocalGenerator"]
