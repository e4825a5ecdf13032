"""Running a recipe: settings -> data and model -> fit -> model directory, results, next commands."""

import contextlib
import json
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
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
from ..evaluation.settings import WITHOUT_GENERATOR, EvaluationSettings
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
from ..utils.locked_folder import full_disk_in_a_sentence
from .class_arguments import load_class, print_optional_groups
from .quiet import quieten
from .recipe import find_recipe, read_recipe
from .report import as_results, as_table, model_card, next_commands
from .runs import RunFolder, claimed_folder, is_first_process
from .sample import (
    SampleSettings,
    check_sampling,
    free_memory,
    help_text,
    read_settings,
    rollouts_file,
    run_sampling,
    settled,
    wait_for_first,
)
from .stages import check_tasks, plan_tasks, run_tasks, run_variants

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


@full_disk_in_a_sentence("What is done stays: make room, then type the same command again.")
def run_recipe(
    recipe: str,
    overrides: list[tuple[str, str | None]],
    *,
    runs: Path = Path("runs"),
    name: str | None = None,
    check: bool = False,
    fresh: bool = False,
) -> int:
    """Run the stages of a recipe; see `lightning run --help`.

    Returns:
        Exit status.
    """
    quieten()
    path = find_recipe(recipe)
    if any(key.endswith("help") for key, _ in overrides):
        return _print_help(path)
    settings = read_recipe(path, overrides)
    sampling = _plan_sampling(settings, overrides, path, runs)
    if "fit" not in settings:
        return _run_without_fit(settings, sampling, path, runs / (name or path.stem), check)
    cli = parse_fit(settings["fit"], str(path))
    if sampling is not None:
        cli.settings = {"sample": asdict(sampling), **cli.settings}
    tasks = _plan_tasks(cli, settings, sampling, path, runs / (name or path.stem) / "model")
    check_tasks(tasks, settings.get("variants", {}).get("runs", ()))
    if check:
        return _check(cli, sampling, path)
    with claimed_folder(runs, path.stem, name, cli.settings, fresh, f"# resolved from {path}\n") as folder:
        status = 0
        if folder.complete:
            rank_zero_only(print)(f"{folder.path} is complete for these settings (--fresh trains again).\n")
            _print_end(folder)
        else:
            status = _sample(sampling) if sampling is not None else 0
            if sampling is not None and not rollouts_file(sampling).exists():
                return status
            # Whether completions were sampled just now must not decide the numbers that training draws.
            if (seed := cli.config["seed_everything"]) is not False:
                L.seed_everything(seed, workers=True, verbose=False)
            status = _fit(cli, folder, fresh) or status
        if status in (0, 3):
            tasks = _plan_tasks(cli, settings, sampling, path, folder.model)
            status = _after_fit(settings, tasks, folder) or status
        return status


def _run_without_fit(
    settings: dict[str, Any], sampling: SampleSettings | None, path: Path, folder: Path, check: bool
) -> int:
    """A recipe that only samples, or only measures."""
    tasks = plan_tasks(settings, str(path), sampling.generator if sampling else None)
    check_tasks(tasks, ())
    if check:
        if sampling is not None:
            check_sampling(sampling)
        for task in tasks:
            print(f"evaluate: {task.task} of {task.generator or 'the embedded pair'}")
        return 0
    status = run_sampling(sampling, wait=True) if sampling is not None else 0
    return run_tasks(tasks, folder, _typed()) or status if tasks else status


def _plan_tasks(
    cli: FitCLI, settings: dict[str, Any], sampling: SampleSettings | None, path: Path, model: Path
) -> list[EvaluationSettings]:
    """What is measured in the end, of the model that will be in this folder; tasks without a generator are left out."""
    if isinstance(cli.model, LenVMModule):
        tasks = plan_tasks(settings, str(path), sampling.generator if sampling else None, str(model))
    else:  # it trains a generator
        tasks = plan_tasks(settings, str(path), str(model))
    return [task for task in tasks if task.generator is not None or task.task in WITHOUT_GENERATOR]


def _after_fit(settings: dict[str, Any], tasks: list[EvaluationSettings], folder: RunFolder) -> int:
    """Variants and evaluations of a run that has been trained."""
    if not is_first_process():
        return 0
    free_memory()
    if "variants" in settings and (status := run_variants(settings, folder.path)):
        return status
    if len(tasks) < len(settings.get("evaluate", ())):
        print("evaluate: left out, nobody says which generator wrote these rollouts (--evaluate.generator NAME)")
    return run_tasks(tasks, folder.path, _typed()) if tasks else 0


def _typed() -> str:
    """The command line, for reports."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _plan_sampling(
    settings: dict[str, Any], overrides: list[tuple[str, str | None]], path: Path, runs: Path
) -> SampleSettings | None:
    """The sample stage of a recipe, with its folder; training reads what it writes, unless the recipe says otherwise.

    None where there is no such stage, or where the command line names other rollouts.
    """
    if "sample" not in settings:
        return None
    for key, value in overrides:
        if key.startswith("fit.data.") and key.rpartition(".")[2] in ("files", "dataset"):
            rank_zero_only(print)(f"sample: left out, --{key} {value} names other rollouts", file=sys.stderr)
            del settings["sample"]
            return None
    sampling = settled(read_settings(settings["sample"], str(path)), runs)
    if "fit" in settings:
        data = settings["fit"]["data"].setdefault("init_args", {})
        if data.get("files") is None and data.get("dataset") is None:
            data["files"] = str(rollouts_file(sampling))
    return sampling


def _sample(sampling: SampleSettings) -> int:
    if not is_first_process():
        wait_for_first(sampling)
        return 0
    try:
        return run_sampling(sampling, wait=True)
    finally:
        free_memory()


def _check(cli: FitCLI, sampling: SampleSettings | None, path: Path) -> int:
    if sampling is not None and not check_sampling(sampling):
        print(f"{path} is ready to sample; its data can be looked at once that is done.")
        return 0
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    print(f"{path} and its data are ready to train on.")
    return 0


def _fit(cli: FitCLI, folder: RunFolder, fresh: bool) -> int:
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
        (part / "README.md").write_text(model_card(results, cli.settings), encoding="utf-8")
    shutil.rmtree(folder.model, ignore_errors=True)
    part.replace(folder.model)
    folder.finish(results)
    _print_end(folder)


@rank_zero_only
def _print_end(folder: RunFolder) -> None:
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    print(as_table(results))
    print(next_commands(folder.path, results))


def _print_help(path: Path) -> int:
    settings = read_recipe(path, [])
    print(f"sample stage, --sample.KEY VALUE:\n{help_text()}\n")
    fit = settings.get("fit", {})
    words = ["--help"] + [f"--{part}.help={fit[part]['class_path']}" for part in ("model", "data") if part in fit]
    for word in words if fit else ():
        with contextlib.suppress(SystemExit):
            FitCLI([word])
        print()
    if "model" in fit:
        print_optional_groups(load_class(fit["model"]["class_path"]), "model")
    return 0
