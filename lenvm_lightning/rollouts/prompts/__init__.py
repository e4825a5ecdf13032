"""Prompts from wherever they are: embedded sets, JSONL, ``datasets``, the paper's sources by name."""

from .load import load_prompts

__all__ = ["load_prompts"]
