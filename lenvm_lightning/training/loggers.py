"""The loggers of a run: TensorBoard in its folder, unless the recipe names others."""

import inspect
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from ..errors import RecipeError
from ..utils.reading import first_line

RUN_FOLDER = "{run}"  # stands for the folder of the run in a logger's settings; it is chosen after they are read


def needs_save_dir(logger_class: type) -> bool:
    """Whether a logger must be told where to write; others have a place of their own, such as `./mlruns`."""
    parameter = inspect.signature(logger_class).parameters.get("save_dir")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def open_loggers(wanted: Any, folder: Path, resumed_step: int | None) -> Any:
    """What the Trainer takes as its `logger`.

    Args:
        wanted: from the recipe: None for TensorBoard, True or False as the Trainer takes them, or class_path and
            init_args of one logger, or a list of these. `{run}` within init_args stands for `folder`.
        folder: of the run.
        resumed_step: the optimizer step that the run goes on from, None at its beginning. What TensorBoard has of later
            ones, from before the run was stopped, is hidden.

    Raises:
        RecipeError: a logger whose package is not installed, that refuses its settings, or that cannot be reached.
    """
    if wanted is None:
        return TensorBoardLogger(
            folder, name="", version="tensorboard", default_hp_metric=False, purge_step=resumed_step
        )
    if isinstance(wanted, bool):
        return wanted
    if isinstance(wanted, list | tuple):
        return [_open_logger(one, folder) for one in wanted]
    return _open_logger(wanted, folder)


def _open_logger(wanted: Any, folder: Path) -> Logger:
    given = dict(wanted.get("init_args") or {})
    for name, value in given.items():
        if isinstance(value, str):
            given[name] = value.replace(RUN_FOLDER, str(folder))
    try:
        logger = instantiate_class((), {"class_path": wanted["class_path"], "init_args": given})
        logger.experiment  # noqa: B018  opens it, so that a server out of reach is known before training
    except Exception as error:  # of the logger's own library, which may raise anything
        raise RecipeError(f"the logger {wanted['class_path']} cannot be used: {first_line(error)}") from error
    return logger
