"""Backbones, value heads, adapters, and the directories they live in."""
