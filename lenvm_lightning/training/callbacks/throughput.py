"""Tokens per second and padding share while training."""

import time
from typing import Any

import lightning as L
import torch

from ...batch import LengthBatch
from ..layout_plan import plan_batch


class Throughput(L.Callback):
    """Logs `train/tokens_per_s` (real tokens, padding not counted) and `train/padding_share`.

    Where a layout computes prompts once, tokens/s counts them for each of their completions, as rows have them, and
    padding is a share of what was computed. Measured over the time since the last log, with what batches were waited
    for and without validation; this rank's tokens times the ranks.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self._tokens: torch.Tensor | float = 0.0
        self._real: torch.Tensor | float = 0.0  # tokens of what was computed
        self._padded = 0
        self._seconds = 0.0
        self._since = self._paused = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop it."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let it go on."""
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: Any, pl_module: L.LightningModule, outputs: Any, batch: LengthBatch, batch_idx: int
    ) -> None:
        """Count the batch, and log every `log_every_n_steps` optimizer steps."""
        there = batch["attention_mask"].sum()  # stays on the device: no host sync here
        self._tokens = self._tokens + there
        if "layout" in batch:
            plan = plan_batch(pl_module.model, batch)  # type: ignore[arg-type]
            self._real, self._padded = self._real + plan.real, self._padded + plan.computed
        else:
            self._real, self._padded = self._real + there, self._padded + batch["attention_mask"].numel()
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        # Between two batches of one optimizer step the number of steps stands still.
        within = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if self.tokens_per_s is not None and (within or trainer.global_step % trainer.log_every_n_steps):
            return
        tokens = float(self._tokens)
        self.tokens_per_s = tokens * trainer.world_size / max(self._seconds, 1e-9)
        for logger in trainer.loggers:
            logger.log_metrics(
                {
                    "train/tokens_per_s": self.tokens_per_s,
                    "train/padding_share": 1.0 - float(self._real) / self._padded,
                },
                step=trainer.global_step,
            )
        self._tokens, self._real, self._padded, self._seconds = 0.0, 0.0, 0, 0.0
