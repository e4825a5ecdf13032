"""One progress bar for the whole run, counted in optimizer steps."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from ...utils.progress import Progress, time_left
from .throughput import Throughput


class StepProgressBar(ProgressBar):
    """Steps done, tokens/s, time left and loss: `Progress`, as Lightning takes it.

    Args:
        seconds: between two lines where stderr is no terminal.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__()
        self._every = seconds
        self._progress: Progress | None = None
        self._total: int | None = None
        self._first = 0
        self._enabled = True

    def disable(self) -> None:
        """Show nothing, on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar from the step the run begins at."""
        if not self._enabled:
            return
        steps = trainer.estimated_stepping_batches
        self._total = None if steps == float("inf") else int(steps)
        self._first = trainer.global_step
        self._progress = Progress("train", "steps", self._total, self._first, seconds=self._every)
        self._progress.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        progress, step = self._progress, trainer.global_step
        last = step == self._total
        if progress is None or not (progress.is_due or last):  # reading the loss waits for the device
            return
        loss = trainer.callback_metrics.get("train/loss")
        left = None if self._total is None else self._total - step
        progress.show(
            step,
            tokens_per_s=next((c.tokens_per_s for c in trainer.callbacks if isinstance(c, Throughput)), None),  # type: ignore[attr-defined]
            seconds_left=None if left is None else time_left(progress.seconds_spent, step - self._first, left),
            facts={} if loss is None else {"loss": f"{float(loss):.4f}"},
            at_once=last,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say in one line what the validation found."""
        if not self._enabled or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        seen = trainer.callback_metrics
        parts = [
            f"{name} {float(seen[key]):.{digits}f} (constant {float(seen[constant]):.{digits}f})"
            for name, key, constant, digits in (
                ("MAE at start", "val/mae_tokens/start", "val/mae_tokens_constant/start", 1),
                ("at 50%", "val/mae_tokens/50", "val/mae_tokens_constant/50", 1),
                ("MRE", "val/mre", "val/mre_constant", 3),
            )
            if key in seen
        ]
        loss = f"validation loss {float(seen['val/loss']):.5f}"
        tqdm.write(f"step {trainer.global_step}: {', '.join([loss, *parts])}", file=sys.stderr)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the bar."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order."""
        self.on_train_end(trainer, pl_module)
