"""The fit stage of a recipe: settings -> data, model and Trainer -> fit -> model directory and results."""

import re
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch.distributed as dist
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from ..errors import LenVMError, RecipeError
from ..models.model_card import CARD_FILE
from ..tinyworld.language_model import TinyLanguageModel
from ..training.callbacks import (
    RemainingCurves,
    ResumableCheckpoint,
    SmallModelThreads,
    StepProgressBar,
    Throughput,
    latest_checkpoint,
)
from ..training.deepspeed import ZeRO
from ..training.fsdp import FullySharded, gather_full_weights, is_sharded
from ..training.loggers import open_loggers
from ..training.module import LenVMModule
from ..utils.own_folder import put_in_place
from ..utils.reading import in_a_sentence
from .allowed_imports import hold_to_list
from .report import as_results, as_table, card_of_run, next_commands
from .run_folder import WRITE_AGAIN, RunFolder

_TRAINER_DEFAULTS = {
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the DataModule deals batches out to the ranks itself
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
}


class LastValidation(L.Callback):
    """Remembers what the newest validation logged, and after how many optimizer steps."""

    def __init__(self) -> None:
        self.step = -1
        self.metrics: Mapping[str, float] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the numbers."""
        self.step = -1 if trainer.sanity_checking else trainer.global_step
        logged = trainer.callback_metrics.items()
        self.metrics = {key: float(value) for key, value in logged if key.startswith("val/")}


class FitCLI(LightningCLI):
    """The fit stage as a LightningCLI: model, data, trainer, and how often to save.

    Args:
        args: settings, or words of a command line.
        **options: more for LightningCLI.
    """

    def __init__(self, args: Any, **options: Any) -> None:
        hold_to_list()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(
                L.LightningModule,
                L.LightningDataModule,
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults=dict(_TRAINER_DEFAULTS),
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                run=False,
                args=args,
                **options,
            )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Declare what LightningCLI does not know."""
        parser.add_class_arguments(ResumableCheckpoint, "checkpoint", skip={"dirpath"}, instantiate=False)

    def before_instantiate_classes(self) -> None:
        """Keep the resolved settings, before anything is built."""
        dumped = self.parser.dump(self.config, skip_unset=False, format="yaml")
        self.settings: dict[str, Any] = {"fit": yaml.safe_load(dumped)}

    def instantiate_classes(self) -> None:
        """Build model and data; Trainer and loggers wait until the folder of the run is known."""
        config = self.config.clone()
        self.loggers = config["trainer"]["logger"]
        config["trainer"]["logger"] = None
        self.config_init = self.parser.instantiate(config)
        self.datamodule, self.model = self.config_init["data"], self.config_init["model"]
        if getattr(self.datamodule, "processor_source", "") is None:
            self.datamodule.processor_source = self.model.backbone_source
            # The same place, and what was said of code that comes with it.
            self.datamodule.trust_remote_code = getattr(self.model, "trust_remote_code", False)

    def build_trainer(self, folder: RunFolder, resumed_step: int | None) -> L.Trainer:
        """The Trainer, with its loggers, and our callbacks beside those of the recipe.

        Raises:
            RecipeError: a device or strategy that is not there, or settings that contradict each other.
        """
        options = dict(self.config_init["checkpoint"])
        self.last_validation = LastValidation()
        given = self.config_init["trainer"]
        self.trainer_defaults["callbacks"] = [
            ResumableCheckpoint(dirpath=str(folder.checkpoints), **options),
            *([LearningRateMonitor(logging_interval="step")] if self.loggers is None or self.loggers else []),
            Throughput(),
            *([RemainingCurves()] if isinstance(self.model, LenVMModule) else []),
            StepProgressBar(),
            SmallModelThreads(),
            self.last_validation,
        ]
        chosen: dict[str, Any] = {"enable_checkpointing": False, "default_root_dir": str(folder.path)}
        chosen["logger"] = open_loggers(self.loggers, folder.path, resumed_step)
        if not self.model.automatic_optimization:
            chosen["gradient_clip_val"] = None  # it clips by itself, and Lightning refuses to
        if given["strategy"] == "fsdp":  # Lightning's own of that name is torch's first FSDP
            chosen["strategy"] = FullySharded()
        if isinstance(given["strategy"], str) and given["strategy"].startswith("deepspeed"):
            chosen["strategy"] = ZeRO.named(given["strategy"])
        if isinstance(chosen.get("strategy", given["strategy"]), (ModelParallelStrategy, ZeRO)) and not isinstance(
            self.model, LenVMModule
        ):
            raise RecipeError(f"{type(self.model).__name__} cannot be sharded over ranks: use strategy: auto")
        try:
            return self.instantiate_trainer(**chosen)
        except (MisconfigurationException, ValueError) as error:
            raise RecipeError(f"the Trainer cannot be built from the settings in fit.trainer: {error}") from error


def parse_fit(fit: dict[str, Any], where: str) -> FitCLI:
    """Settings of the fit stage, typed and resolved, with model and data instantiated.

    Raises:
        RecipeError: settings that are missing, or that contradict each other.
    """
    try:
        return FitCLI(yaml.safe_load(yaml.safe_dump(fit)), parser_kwargs={"exit_on_error": False})
    except ArgumentError as error:
        # Model and data may be None for the parser, and it says so after what matters.
        text = " ".join(str(error).split()).rpartition("Errors: - ")[2].partition(" - Expected a <class 'NoneType'>")[0]
        raise RecipeError(f"{where} cannot be used: {text}") from error
    except ValueError as error:
        # The parser wraps what a constructor raises; our own errors are already written for people.
        raise _ours(error) or error from None


def _ours(error: BaseException | None) -> LenVMError | None:
    """The LenVMError that another error wraps, if it does."""
    while error is not None and not isinstance(error, LenVMError):
        error = error.__cause__ or error.__context__
    return error


def run_fit(cli: FitCLI, folder: RunFolder, fresh: bool) -> int:
    """Train from the last checkpoint on, validate, and write model directory and results.

    Args:
        cli: the settings.
        folder: of the run.
        fresh: start anew, whatever checkpoints there are.

    Returns:
        Exit status: 0 done, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    # The first process has emptied a fresh folder, but others may look before it did.
    checkpoint = None if fresh else latest_checkpoint(folder.checkpoints)
    step = int(re.sub(r"\D", "", checkpoint.stem)) if checkpoint else None
    trainer = cli.build_trainer(folder, step)
    if checkpoint:
        rank_zero_info(f"{folder.path}: going on from step {step}")
    else:
        rank_zero_info(f"{folder.path}: starting")
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        return 143
    except MisconfigurationException as error:
        raise RecipeError(f"the Trainer refuses the settings in fit.trainer: {error}") from error
    except SystemExit:
        if trainer.interrupted:  # Lightning's answer to Ctrl-C
            return 130
        raise
    # A run that was killed after its last step has not been validated by this process.
    if cli.last_validation.step == trainer.global_step:
        metrics = cli.last_validation.metrics
    else:
        found = trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        metrics = found[0] if found else {}  # limit_val_batches: 0
    with gather_full_weights(cli.model):
        if trainer.is_global_zero:
            _finish(cli, folder, trainer, metrics)
    if isinstance(trainer.strategy, ZeRO):
        trainer.strategy.release()
    if is_sharded(cli.model):  # other strategies move them to the CPU, so that there is room for evaluations
        trainer.strategy.optimizers, cli.model.model = [], None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # else the metrics of evaluations would wait for ranks that are gone
    return 0


@rank_zero_only
def _finish(cli: FitCLI, folder: RunFolder, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    results = as_results(cli.model, cli.datamodule, trainer.global_step, metrics)
    part = folder.path / ".model"
    shutil.rmtree(part, ignore_errors=True)
    cli.model.save_pretrained(part, cli.datamodule.processor)
    if isinstance(cli.model, TinyLanguageModel):
        rank_zero_info("writing answers to held-out prompts, as this model and as the shipped one")
        results["quality"] = cli.model.judge(part)
    else:
        card_of_run(cli.model.model.config, results, cli.settings).save(part / CARD_FILE)
    put_in_place(part, folder.model)
    folder.finish(results)
    print_end(folder)


@rank_zero_only
def print_end(folder: RunFolder) -> None:
    """Print the table of errors of a finished run, and the next commands.

    Raises:
        RecipeError: its results are not what a run leaves.
    """
    results = folder.read_results()
    with in_a_sentence(f"{folder.results} does not hold what a run leaves", RecipeError, WRITE_AGAIN):
        told = f"{as_table(results)}\n{next_commands(folder.path, results)}"
    print(told)
