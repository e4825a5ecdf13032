"""A matplotlib figure to every logger of a run, whatever its kind: as TensorBoard, W&B, MLflow and CSV take figures."""

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure

_told: set[type] = set()  # kinds of loggers of which it was said that they get no figures


def log_figure(loggers: Iterable[Logger], tag: str, figure: Figure, step: int) -> None:
    """Hand a figure to each logger.

    TensorBoard and W&B show it under its tag. MLflow keeps a PNG file a step among the artifacts of the run, in a
    folder of that tag; CSV has it beside `metrics.csv`. Of a logger of another kind it is said once that it gets none.

    Args:
        loggers: those of the Trainer.
        tag: name of the figure, such as `val/remaining`.
        figure: to be drawn; it stays open.
        step: optimizer steps done.
    """
    file = f"{tag}/step-{step:09d}.png"
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, global_step=step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [figure], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, file)
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        elif type(logger) not in _told:
            _told.add(type(logger))
            rank_zero_warn(f"{type(logger).__name__} gets scalars, but no figures: {tag} is not logged there")
