"""Which logger gets a figure, and how."""

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenvm_lightning.training.callbacks import log_figure


@pytest.fixture
def figure():
    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    return figure


def test_every_logger_gets_every_step(tmp_path, figure):
    board, table = TensorBoardLogger(tmp_path, name="tb", version=""), CSVLogger(tmp_path, name="csv", version="")
    for step in (5, 10):
        log_figure([board, table], "val/x", figure, step)
    board.finalize("success")
    events = EventAccumulator(board.log_dir).Reload()
    assert [image.step for image in events.Images("val/x")] == [5, 10]
    files = sorted(path.name for path in (tmp_path / "csv" / "val" / "x").iterdir())
    assert files == ["step-000000005.png", "step-000000010.png"]


class Other(DummyLogger):
    """A logger that nobody knows."""


def test_of_an_unknown_logger_it_is_said_once(figure, recwarn):
    with pytest.warns(UserWarning, match="Other gets scalars, but no figures: val/x is not logged there"):
        log_figure([Other()], "val/x", figure, 1)
    recwarn.clear()
    log_figure([Other()], "val/x", figure, 2)
    assert not recwarn
