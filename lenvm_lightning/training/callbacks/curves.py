"""A figure at each validation: predicted against true remaining tokens along a few held-out completions."""

from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ...batch import LengthBatch
from .log_figure import log_figure


class _Panel(NamedTuple):
    """Tokens that remain along a completion: true, predicted, and between which two 80% are predicted."""

    true: np.ndarray
    predicted: np.ndarray
    interval: tuple[np.ndarray, np.ndarray] | None


def _panel(model: Any, outputs: Tensor, remaining: Tensor) -> _Panel:
    """Of the outputs (L + 1, 1 + K) at the states of a completion."""
    interval = None
    if model.length_rule is not None:
        distribution = model.distribution(outputs)
        interval = (_array(distribution.quantile(0.1)), _array(distribution.quantile(0.9)))
    return _Panel(_array(remaining), _array(model.remaining(outputs[:, 0])), interval)


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


class RemainingCurves(L.Callback):
    """Logs the figure `val/remaining` to every logger: one panel a completion, for vision with its image.

    The completions are the same at every validation, spread over the held-out lengths. Where a distribution is
    predicted, its 80% interval is shaded.

    Args:
        completions: number of panels.
    """

    def __init__(self, completions: int = 4) -> None:
        self.completions = completions
        self._panels: dict[int, _Panel] = {}

    def _wanted(self, trainer: L.Trainer) -> list[int]:
        sizes = trainer.datamodule.val_sizes  # type: ignore[attr-defined]
        order = np.argsort(sizes, kind="stable")
        places = np.linspace(0.1, 0.9, self.completions) * (len(order) - 1)
        return list(dict.fromkeys(int(order[round(p)]) for p in places))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: LengthBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of the chosen rows."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        wanted = set(self._wanted(trainer))
        for i, row in enumerate(batch["row"].tolist()):
            if row in wanted:
                mask = batch["mask"][i]
                with torch.no_grad():
                    self._panels[row] = _panel(pl_module.model, outputs[i][mask], batch["remaining"][i][mask])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and log the figure."""
        if not self._panels:
            return
        figure = self._draw(trainer)
        log_figure(trainer.loggers, "val/remaining", figure, trainer.global_step)
        self._panels.clear()

    def _draw(self, trainer: L.Trainer) -> Figure:
        rows = sorted(self._panels)
        data = trainer.datamodule.val_rows  # type: ignore[attr-defined]
        images = {row: data[row]["images"][:1] for row in rows}
        height = 2 if any(images.values()) else 1
        figure = Figure(figsize=(3.6 * len(rows), 2.8 * height), layout="constrained")
        panels = figure.subplots(height, len(rows), squeeze=False)
        for column, row in enumerate(rows):
            panel = self._panels[row]
            axis = panels[0][column]
            axis.plot(panel.true, color="0.6", linewidth=2, label="true")
            axis.plot(panel.predicted, color="C0", linewidth=1.2, label="predicted")
            if panel.interval is not None:
                axis.fill_between(
                    range(len(panel.true)), *panel.interval, color="C0", alpha=0.2, linewidth=0, label="80%"
                )
            axis.set(xlabel="tokens written", ylim=(0, None), title=f"held-out {row}")
            if height == 2:
                panels[1][column].axis("off")
                if images[row]:
                    panels[1][column].imshow(images[row][0])
        panels[0][0].set_ylabel("tokens remaining")
        panels[0][0].legend(frameon=False)
        return figure
