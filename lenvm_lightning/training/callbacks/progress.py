"""One progress bar for the whole run, counted in optimizer steps."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from .throughput import Throughput


class StepProgressBar(ProgressBar):
    """Steps done, time left, loss and tokens/s. On a terminal a bar; in a log file a line every `seconds`.

    Args:
        seconds: between two lines where stderr is no terminal.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__()
        self._every = seconds
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing, on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar from the step the run begins at."""
        if not self._enabled:
            return
        total = trainer.estimated_stepping_batches
        self._bar = tqdm(
            desc="train",
            total=int(total) if total != float("inf") else None,
            initial=trainer.global_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._began, self._first, self._told = time.monotonic(), trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        bar = self._bar
        if bar is None:
            return
        speed = next((c.tokens_per_s for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        loss = trainer.callback_metrics.get("train/loss")
        facts = {} if loss is None else {"loss": f"{float(loss):.4f}"}
        if speed is not None:
            facts["tokens/s"] = f"{speed:,.0f}"
        if not bar.disable:
            bar.n = trainer.global_step
            bar.set_postfix(facts, refresh=False)
            bar.update(0)
        elif time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            self._print_line(trainer.global_step, int(bar.total) if bar.total else None, facts)

    def _print_line(self, step: int, total: int | None, facts: dict[str, str]) -> None:
        spent = time.monotonic() - self._began
        left = f", {_clock(spent / max(1, step - self._first) * (total - step))} left" if total else ""
        text = "".join(f", {name} {value}" for name, value in facts.items())
        print(
            f"step {step}{f'/{total}' if total else ''}, {_clock(spent)} elapsed{left}{text}",
            file=sys.stderr,
            flush=True,
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
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order."""
        self.on_train_end(trainer, pl_module)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
