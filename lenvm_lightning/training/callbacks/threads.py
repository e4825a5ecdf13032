"""One CPU thread while small models train."""

import contextlib

import lightning as L

from ...utils.threads import is_small, one_thread


class SmallModelThreads(L.Callback):
    """Trains and validates small models on a CPU with one thread, see `utils.threads`."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the threads away."""
        self._held.enter_context(one_thread(is_small(pl_module)))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take them away where there is no training around it."""
        self._held.enter_context(one_thread(is_small(pl_module)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give them back."""
        self._held.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give them back."""
        self._held.close()
