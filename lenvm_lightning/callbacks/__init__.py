"""Lightning callbacks: checkpoints that survive, throughput, a progress bar, pictures of predictions."""

from .checkpointing import ResumableCheckpoint, latest_checkpoint
from .curves import RemainingCurves
from .progress import StepProgressBar
from .throughput import Throughput

__all__ = ["RemainingCurves", "ResumableCheckpoint", "StepProgressBar", "Throughput", "latest_checkpoint"]
