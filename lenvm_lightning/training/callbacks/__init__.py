"""Lightning callbacks: checkpoints that survive, throughput, a progress bar, figures of predictions, threads."""

from .checkpointing import ResumableCheckpoint, latest_checkpoint
from .curves import RemainingCurves
from .log_figure import log_figure
from .progress import StepProgressBar
from .threads import SmallModelThreads
from .throughput import Throughput

__all__ = [
    "RemainingCurves",
    "ResumableCheckpoint",
    "SmallModelThreads",
    "StepProgressBar",
    "Throughput",
    "latest_checkpoint",
    "log_figure",
]
