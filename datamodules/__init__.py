"""Rollouts to batches of token ids, images and remaining tokens. Nothing here knows gamma."""

from .corpus import TinyCorpus
from .rollouts import RolloutsDataModule, TextRollouts, VisionRollouts

__all__ = ["RolloutsDataModule", "TextRollouts", "TinyCorpus", "VisionRollouts"]
