"""Threads of small models."""

import pytest
import torch

from lenvm_lightning.training.callbacks import SmallModelThreads


@pytest.mark.parametrize(("width", "threads"), [(8, 1), (5000, 2)])
def test_small_models_train_with_one_thread(width, threads):
    callback, model = SmallModelThreads(), torch.nn.Linear(width, width)
    torch.set_num_threads(2)
    try:
        callback.on_fit_start(None, model)
        callback.on_validation_start(None, model)  # within training
        assert torch.get_num_threads() == threads
        callback.teardown(None, model, "fit")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
