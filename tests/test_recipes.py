"""The shipped recipes: they parse, carry a card that does not lie, and build the models they name (on meta)."""

import inspect
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from places import CONFIGS

from datamodules import TextRollouts, VisionRollouts
from lenvm_lightning import BackboneConfig, LoRA, LossConfig, OptimizerConfig, TextLenVM, VisionLenVM
from lenvm_lightning.evaluation.read_settings import fields_of_task
from lenvm_lightning.models.adapters import add_adapter
from lenvm_lightning.pipeline.evaluate_stage import needs_generator, plan_tasks
from lenvm_lightning.pipeline.fit_stage import FitCLI, parse_fit
from lenvm_lightning.pipeline.recipe import find_recipe, read_recipe, recipes_folder, vary
from lenvm_lightning.pipeline.sample_stage import FIELDS, read_settings
from lenvm_lightning.tinyworld.datamodule import TinyCorpus
from lenvm_lightning.tinyworld.language_model import TinyLanguageModel

RECIPES = sorted(recipes_folder().glob("*.yaml"))
TRAINING = [path for path in RECIPES if "\nfit:" in path.read_text(encoding="utf-8")]
LABELS = ("Hardware", "Minutes", "Memory", "Reached", "Run", "Override")


def parse(path: Path, overrides: list[tuple[str, str | None]] | None = None) -> FitCLI:
    return parse_fit(read_recipe(path, overrides or [])["fit"], str(path))


def card(path: Path) -> dict[str, str]:
    """What the comment at the top of a recipe says, by label."""
    comment = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    return dict(re.findall(r"^# (\w+): +(.+)$", comment.group(), re.M)) if comment else {}


def flags(command: str) -> list[tuple[str, str | None]]:
    words = shlex.split(command)
    return [(key.removeprefix("--"), value) for key, value in zip(words[::2], words[1::2], strict=True)]


def defaults_of(cls: type) -> dict:
    owner = getattr(cls, "settings_class", cls)
    return {name: parameter.default for name, parameter in inspect.signature(owner).parameters.items()}


def repeated(given: dict, defaults: dict) -> list[str]:
    """Settings that are what they would be anyway, those of groups included."""
    groups = {"backbone": BackboneConfig, "loss": LossConfig, "optimizer": OptimizerConfig, "lora": LoRA}
    found = []
    for name, value in given.items():
        if name in groups and isinstance(value, dict):
            found += [f"{name}.{inner}" for inner in repeated(value, defaults_of(groups[name]))]
        elif value == defaults[name]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_recipe_parses(path):
    cli = parse(path)
    pairs = ((TextLenVM, TextRollouts), (VisionLenVM, VisionRollouts), (TinyLanguageModel, TinyCorpus))
    assert (type(cli.model), type(cli.datamodule)) in pairs
    assert cli.datamodule.processor_source == cli.model.backbone_source
    assert find_recipe(path.stem) == path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_card(path):
    entries = card(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert [label for label in LABELS if not entries.get(label)] == []
    run, name, *rest = entries["Run"].removeprefix("lightning ").split(maxsplit=2)
    assert (run, name) == ("run", f"recipes/{path.name}")
    read_recipe(path, flags(" ".join([*rest, entries["Override"]])))


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_recipe_repeats_no_default(path):
    fit = yaml.safe_load(path.read_text(encoding="utf-8"))["fit"]
    cli = parse(path)
    for section, owner in (("model", cli.model), ("data", cli.datamodule)):
        given = {key: value for key, value in fit[section]["init_args"].items() if key != "files"}
        assert repeated(given, defaults_of(type(owner))) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_sample_stage(path):
    recipe = read_recipe(path, [])
    if "sample" in recipe:
        settings = read_settings(recipe["sample"], str(path))
        defaults = {name: field.default for name, field in FIELDS.items()}
        assert [name for name, value in recipe["sample"].items() if value == defaults[name]] == []
        assert settings.sampling.max_tokens >= 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_evaluate_stage(path):
    """Every recipe measures; what it measures is settled, and no setting says what is so anyway."""
    recipe = read_recipe(path, [])
    tasks = plan_tasks(recipe, str(path), "tiny-vl" if "vl" in path.stem else "tiny-text", "model")
    assert tasks
    for section in recipe["evaluate"]:
        assert [key for key, value in section.items() if value == fields_of_task(section["task"])[key].default] == []
    for task in tasks:
        if needs_generator(task):
            assert task.generator is not None or path.stem not in ("text_lenvm", "vlm_lenvm", "paper_tiny")


def test_variants_are_what_they_are_called():
    """Each changes what its name says, and the reports of the recipe look at all of them."""
    recipe = read_recipe(find_recipe("paper_tiny"), [])
    runs = recipe["variants"]["runs"]
    words = {
        "seed": "seed", "layers": "keep_layers", "prompts": "train_prompts", "completions": "train_completions",
        "target": "target", "gamma": "gamma", "lambda": "lam", "precision": "precision", "batches": "bucket",
    }  # fmt: skip
    for name, changed in runs.items():
        kind, _, value = name.partition("-")
        assert any(key.endswith(words[kind]) for key in changed)
        base, varied = recipe["fit"], vary(recipe, name)["fit"]
        assert varied != base
        if kind in ("layers", "prompts", "completions", "gamma", "lambda"):
            assert float(value) in [float(number) for number in changed.values()]
        parse_fit(varied, name)
    looked_at = {name for task in recipe["evaluate"] for pattern in task.get("runs", ()) for name in runs
                 if fnmatch(name, pattern)}  # fmt: skip
    assert looked_at == set(runs)


# Language and vision parameters as published, without vocabulary heads that are not tied.
REAL = {
    "qwen2.5-1.5b": {"language": 1_543_714_304, "vision": 0, "width": 1536, "max_length": 3000},
    "qwen2.5-3b": {"language": 3_085_938_688, "vision": 0, "width": 2048, "max_length": 3000},
    "qwen2.5-7b": {"language": 7_070_619_136, "vision": 0, "width": 3584, "max_length": 3000, "devices": 4},
    "qwen2.5-7b-zero2": {"language": 7_070_619_136, "vision": 0, "width": 3584, "max_length": 3000, "devices": 8,
                         "strategy": "deepspeed_stage_2"},
    "qwen3-1.7b": {"language": 1_720_574_976, "vision": 0, "width": 2048, "max_length": 16000, "gamma": 0.999,
                   "row": 4000},
    "qwen2.5-32b-fsdp": {"language": 31_985_308_672, "vision": 0, "width": 5120, "max_length": 3000, "devices": 32},
    "qwen2.5-vl-3b": {"language": 3_085_938_688, "vision": 668_684_288, "width": 2048, "max_length": 4000},
    "qwen2.5-vl-7b-qlora": {"language": 7_070_619_136, "vision": 676_550_144, "width": 3584, "max_length": 4000,
                            "lr": 2e-4},
}  # fmt: skip


@pytest.fixture(scope="module", params=REAL)
def real(request) -> tuple[dict, FitCLI]:
    """A recipe of a published backbone, its model built without memory."""
    path = recipes_folder() / f"{request.param}.yaml"
    folder = CONFIGS / Path(parse(path).model.backbone_source).name.lower()
    lora = parse(path).model.settings.lora
    whole = [("fit.model.lora", "null"), ("fit.model.backbone.quantise", "null")] if lora else []
    cli = parse(path, [("fit.model.backbone", str(folder)), ("fit.model.backbone.pretrained", "false"), *whole])
    with torch.device("meta"):
        cli.model.configure_model()
        if lora:  # on weights that are not there
            add_adapter(cli.model.model.backbone, lora)
    return {"lora": lora, "lr": 2e-5, **REAL[request.param], "recipe": request.param}, cli


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def test_published_backbone(real):
    expected, cli = real
    model = cli.model.model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    width = expected["width"]
    assert model.v_head.fc.weight.shape == (width, width)
    assert count(model.v_head.parameters()) == width * width + 2 * width + 1
    vision = [p for part in model.vision_modules() for p in part.parameters()]
    assert count(vision) == expected["vision"]
    adapters = [p for name, p in model.backbone.named_parameters() if ".lora_" in name]
    language = count(model.backbone.get_decoder().parameters()) - count(adapters)
    assert language == expected["language"]
    assert count(model.backbone.parameters()) == language + count(vision) + count(adapters)  # no vocabulary head
    assert not any(p.requires_grad for p in vision)
    trained = count(p for p in cli.model.parameters() if p.requires_grad)
    assert trained == count(model.v_head.parameters()) + (count(adapters) if expected["lora"] else language)
    if expected["lora"]:  # rank x (in + out) of the seven linear layers of each of 28 layers
        assert count(adapters) == 16 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    else:
        said = re.search(r"take (\d+) GB", card(recipes_folder() / f"{expected['recipe']}.yaml")["Memory"])
        assert (16 * trained + 4 * count(vision)) / 1e9 == pytest.approx(float(said[1]), rel=0.03)  # as the card says


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_published_backbone_is_optimised_but_for_its_vision(real):
    expected, cli = real
    cli.model._trainer = SimpleNamespace(estimated_stepping_batches=1000, precision="bf16-mixed")
    made = cli.model.configure_optimizers()
    groups = made["optimizer"].param_groups
    held = [p for group in groups for p in group["params"]]
    assert all(p.requires_grad for p in held)
    assert {id(p) for p in held} == {id(p) for p in cli.model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})
    lr = expected["lr"]
    assert {group["initial_lr"] for group in groups} == {lr}
    rates = []
    for _step in range(51):
        rates.append(groups[0]["lr"])
        made["lr_scheduler"]["scheduler"].step()
    assert rates[0] == 0.0
    assert rates[50] == max(rates) == lr


def test_paper_settings(real):
    expected, cli = real
    settings, data, trainer = cli.model.settings, cli.datamodule, cli.config_init["trainer"]
    assert (settings.gamma, settings.loss, settings.head_dropout) == (expected.get("gamma", 0.997), LossConfig(), 0.0)
    assert settings.backbone.gradient_checkpointing
    assert data.settings.max_length == expected["max_length"]
    assert data.settings.max_pixels == (262144 if expected["vision"] else None)
    assert (trainer["max_epochs"], trainer["precision"]) == (2, "bf16-mixed")
    devices = expected.get("devices", 1)
    strategy, per_machine = trainer["strategy"], trainer["devices"]
    sequences = data.settings.batch_tokens * trainer["accumulate_grad_batches"] * devices / expected.get("row", 1000)
    assert 900 < sequences < 1100
    assert strategy == expected.get("strategy", "fsdp" if devices > 1 else "auto")
    assert (devices == 1 and per_machine == "auto") or per_machine * trainer["num_nodes"] == devices
