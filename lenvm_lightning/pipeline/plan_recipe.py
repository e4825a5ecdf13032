"""``lenvm plan``: what a recipe's training takes, before anything is loaded."""

import argparse
import json
import math
from typing import Any

from datamodules import RolloutsDataModule

from ..errors import CheckpointError, RecipeError
from ..models.backbone import load_config
from ..planning.dry_run import DryRunStep
from ..planning.memory_kinds import COPIES, HEAD, KINDS, LANGUAGE, RECOMPUTE, VISION
from ..planning.plan import NOT_COUNTED, Plan, plan
from ..planning.settings import BatchShape, PlanSettings
from ..training.module import LenVMModule
from ..training.strategies import name_of, unsupported_settings
from .allowed_imports import imports_from
from .fit_stage import FitCLI, parse_fit
from .quiet import quieten
from .recipe import find_recipe, read_recipe

_ANSWER = 64  # tokens beside the image, in the shortest rows that are planned for: a question, a short answer
_SAID = {LANGUAGE: "activations, language model", VISION: "activations, vision tower",
         HEAD: "activations, value head", COPIES: "weights cast to 16 bits"}  # fmt: skip


def run_plan(arguments: argparse.Namespace, overrides: list[tuple[str, str | None]]) -> int:
    """Print the plan of a recipe; see ``lenvm plan --help``.

    Returns:
        Exit status.

    Raises:
        RecipeError: a recipe that trains no length value model, or settings that cannot be planned.
        CheckpointError: no config of its backbone.
    """
    given = {"row-tokens": arguments.row_tokens, "tflops": arguments.tflops, "tokens": arguments.tokens}
    if wrong := [f"--{name} must be above 0, got {n}" for name, n in given.items() if n is not None and not n > 0]:
        raise RecipeError("; ".join(wrong))
    quieten()
    with imports_from(arguments.allow_import):
        return _print_plan(arguments, overrides)


def _print_plan(arguments: argparse.Namespace, overrides: list[tuple[str, str | None]]) -> int:
    path = find_recipe(arguments.recipe)
    recipe = read_recipe(path, overrides)
    if "fit" not in recipe:
        raise RecipeError(f"{path} has no fit stage, so there is no training to plan")
    cli = parse_fit(recipe["fit"], str(path))
    model, data = cli.model, cli.datamodule
    if not isinstance(model, LenVMModule) or not isinstance(data, RolloutsDataModule):
        raise RecipeError(f"{path} trains {type(model).__name__}; only length value models on rollouts can be planned")
    settings = settings_of(cli)
    if problems := unsupported_settings(model.settings, settings.strategy, settings.precision, data.kind != "text"):
        raise RecipeError(f"{path} cannot be trained:\n  " + "\n  ".join(problems))
    found = plan(model, shapes_of(model, data, arguments.row_tokens), settings)
    if arguments.json:
        print(json.dumps(as_json(found, str(path), arguments.tflops, arguments.tokens)))
    else:
        print(describe(found, model, str(path), arguments.tflops, arguments.tokens))
        if data.settings.layout != "rows":
            print(f"Batches are planned as padded rows; layout: {data.settings.layout} takes as much at most.")
    return 0


def settings_of(cli: FitCLI) -> PlanSettings:
    """What the Trainer of a recipe would do."""
    trainer = cli.config_init["trainer"]
    devices, strategy = trainer["devices"], trainer["strategy"]
    if isinstance(devices, str) and "," in devices:
        devices = devices.split(",")
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices).isdigit():
        count = int(devices)
    else:
        count = 1  # auto: nobody knows here where it will run
    return PlanSettings(
        precision=str(trainer["precision"] or "32-true"),
        accumulate=trainer["accumulate_grad_batches"],
        devices=max(1, count) * trainer["num_nodes"],
        strategy=name_of(strategy),
        gpu=trainer["accelerator"] != "cpu",
    )


def shapes_of(model: LenVMModule, data: RolloutsDataModule, row_tokens: int | None = None) -> list[BatchShape]:
    """The batches that take the most: of the longest rows, and with images also of the shortest, which are many.

    Args:
        model: for the backbone's config.
        data: for the limits of rows and batches.
        row_tokens: plan for rows of so many tokens instead of the longest.

    Raises:
        RecipeError: images for a backbone that takes none, or none that this could make.
    """
    length = min(row_tokens or data.settings.limits.max_length, data.settings.limits.max_length)
    name = "longest rows" if length == data.settings.limits.max_length else f"rows of {length:,}"
    longest = BatchShape(name, max(1, data.settings.batch_tokens // length), length)
    if data.kind == "text":
        return [longest]
    grid, tokens = _largest_image(model, data)
    length = max(length, tokens + _ANSWER)
    longest = BatchShape(name, max(1, data.settings.batch_tokens // length), length, grid, tokens)
    short = min(tokens + _ANSWER, length)
    most = BatchShape("most images", max(1, data.settings.batch_tokens // short), short, grid, tokens)
    return [longest, most] if row_tokens is None and most.rows > longest.rows else [longest]


def _largest_image(model: LenVMModule, data: RolloutsDataModule) -> tuple[tuple[int, int, int], int]:
    """Grid and tokens of the largest image, about square, that a row may have."""
    backbone = model.settings.backbone
    config = load_config(backbone.source, backbone.overrides, trust_remote_code=backbone.trust_remote_code)
    tower = getattr(config, "vision_config", None)
    if tower is None:
        raise RecipeError(f"backbone {model.backbone_source!r} reads text only: use TextLenVM and TextRollouts")
    missing = [name for name in ("patch_size", "spatial_merge_size", "temporal_patch_size") if not hasattr(tower, name)]
    if missing:
        raise RecipeError(
            f"images of a {config.model_type} cannot be planned: its vision_config has no {', '.join(missing)} "
            "(those of Qwen's vision-language models can)"
        )
    pixels = [limit for limit in (data.settings.limits.max_pixels, _processor_pixels(data)) if limit]
    room = data.settings.limits.prompt - _ANSWER // 2  # a prompt with its image that is longer is unsupported_settings
    merged = (tower.patch_size * tower.spatial_merge_size) ** 2
    tokens = max(1, min([room, *(limit // merged for limit in pixels)]))
    rows = math.isqrt(tokens)
    columns = tokens // rows
    return (1, rows * tower.spatial_merge_size, columns * tower.spatial_merge_size), rows * columns


def _processor_pixels(data: RolloutsDataModule) -> int | None:
    """The most pixels that the image processor leaves of an image; None where it is not there to be asked."""
    try:
        size: Any = getattr(data.processor.image_processor, "size", None) or {}
    except (CheckpointError, AttributeError):
        return None
    return size.get("longest_edge") or size.get("max_pixels")


# -- output -----------------------------------------------------------------------------------------------------------


def _times(found: Plan, step: DryRunStep, tflops: float | None, tokens: float | None) -> dict[str, float]:
    """Tokens and operations of an optimizer step, and how long it and the whole training take at a given speed."""
    s = found.settings
    numbers = {
        "tokens_per_batch": step.shape.tokens,
        "tokens_per_optimizer_step": step.shape.tokens * s.accumulate * s.devices,
        "rows_per_optimizer_step": step.shape.rows * s.accumulate * s.devices,
        "tflop_per_optimizer_step_and_device": sum(step.flops.values()) * s.accumulate / 1e12,
        "recomputed_tflop": step.flops.get(RECOMPUTE, 0) * s.accumulate / 1e12,
    }
    if tflops:
        numbers["optimizer_step_s"] = numbers["tflop_per_optimizer_step_and_device"] / tflops
        if tokens:
            steps = tokens / numbers["tokens_per_optimizer_step"]
            numbers["training_h"] = numbers["optimizer_step_s"] * steps / 3600
    return numbers


def as_json(found: Plan, recipe: str, tflops: float | None, tokens: float | None) -> dict[str, Any]:
    """Everything in a plan, with units in its keys."""
    return {
        "recipe": recipe,
        "settings": vars(found.settings),
        "parameters": {name: vars(part) for name, part in found.parameters.items()},
        "batches": [
            {
                "batch": vars(step.shape),
                "peak_bytes": step.peak,
                "fullest": step.fullest,
                "memory_bytes": step.memory,
                "flop": step.flops,
                **_times(found, step, tflops, tokens),
            }
            for step in found.steps
        ],
        "not_counted": NOT_COUNTED,
    }


def describe(found: Plan, model: LenVMModule, recipe: str, tflops: float | None, tokens: float | None) -> str:
    """The plan as tables for people."""
    backbone, s = model.settings.backbone, found.settings
    how = [s.precision, f"{backbone.dtype} weights" if "true" not in s.precision else ""]
    how += ["checkpointing" if backbone.gradient_checkpointing else "no checkpointing", model.settings.optimizer.kind]
    how += [f"quantised to {backbone.quantise}" if backbone.quantise else "", "GPU" if s.gpu else "CPU"]
    how += [f"{s.devices} devices, {s.strategy}" if s.devices > 1 else "1 device"]
    lines = [f"{recipe}: {type(model).__name__} on {model.backbone_source}", ", ".join(filter(None, how)), ""]
    lines += [*_table("parameters", ["trained", "frozen"], _parameter_rows(found)), ""]
    for step in found.steps:
        lines += [*_memory_lines(step), ""]
    lines += _table("work", [step.shape.name for step in found.steps], _work_rows(found, tflops, tokens))
    return "\n".join([*lines, "", f"Counted, not measured. Not counted: {NOT_COUNTED}."])


def _table(title: str, header: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    width = max(len(name) for name, _ in rows) + 4
    return [
        f"{title:{width}}" + "".join(f"{cell:>18}" for cell in header),
        *(f"  {name:{width - 2}}" + "".join(f"{cell:>18}" for cell in cells) for name, cells in rows),
    ]


def _parameter_rows(found: Plan) -> list[tuple[str, list[str]]]:
    parts = found.parameters
    rows = [(name, [f"{part.trained:,}", f"{part.frozen:,}"]) for name, part in parts.items()]
    totals = [sum(part.trained for part in parts.values()), sum(part.frozen for part in parts.values())]
    return [*rows, ("all", [f"{total:,}" for total in totals])]


def _memory_lines(step: DryRunStep) -> list[str]:
    """Memory of a batch by part: one column a phase, at its fullest moment."""
    unit, name = (2**30, "GiB") if step.peak >= 2**30 else (2**20, "MiB")
    phases, shape = step.memory, step.shape
    rows: list[tuple[str, list[str]]] = []
    for kind in KINDS:
        values = [kinds.get(kind, 0.0) / unit for kinds in phases.values()]
        if max(values) >= 0.005:
            rows.append((_SAID.get(kind, kind), [f"{value:,.2f}" for value in values]))
            if kind == LANGUAGE and shape.image_tokens:
                share = shape.image_tokens / shape.length
                rows.append(("  of these, image tokens", [f"{share * value:,.2f}" for value in values]))
    rows.append(("all", [f"{sum(kinds.values()) / unit:,.2f}" for kinds in phases.values()]))
    title = f"memory of a device, {name}, {shape.name}: {shape.rows:,} x {shape.length:,} tokens"
    return [title, *_table("", list(phases), rows), f"  peak: {step.peak / unit:,.2f} {name}, {step.fullest}"]


def _work_rows(found: Plan, tflops: float | None, tokens: float | None) -> list[tuple[str, list[str]]]:
    numbers = [_times(found, step, tflops, tokens) for step in found.steps]
    shapes = [step.shape for step in found.steps]
    rows = [("rows x tokens of a batch", [f"{shape.rows:,} x {shape.length:,}" for shape in shapes])]
    if shapes[0].image_tokens:
        rows.append(("image tokens of a row", [f"{shape.image_tokens:,}" for shape in shapes]))
    for said, key in (
        ("rows of an optimizer step", "rows_per_optimizer_step"),
        ("tokens of an optimizer step", "tokens_per_optimizer_step"),
        ("TFLOP of it, per device", "tflop_per_optimizer_step_and_device"),
        ("  of these, recomputed", "recomputed_tflop"),
        ("seconds of it", "optimizer_step_s"),
        ("hours of the training", "training_h"),
    ):
        if numbers[0].get(key):
            rows.append((said, [_number(number[key]) for number in numbers]))
    return rows


def _number(value: float) -> str:
    """Whole where it is large, with three digits where it is small."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
