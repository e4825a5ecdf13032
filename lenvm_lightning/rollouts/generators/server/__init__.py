"""Completions from OpenAI-compatible servers."""

from .generator import ServerGenerator

__all__ = ["ServerGenerator"]
