"""Rollouts to batches of token ids, images and remaining tokens. Nothing here knows gamma."""

from .rollouts import RolloutsDataModule, TextRollouts, VisionRollouts

__all__ = ["RolloutsDataModule", "TextRollouts", "VisionRollouts"]
