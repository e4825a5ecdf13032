"""Mistakes in a recipe: each with its file, its line and the nearest key, all at once."""

import pytest
import yaml

from lenvm_lightning import BackboneConfig
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.pipeline.allowed_imports import imports_from
from lenvm_lightning.pipeline.fit_stage import parse_fit
from lenvm_lightning.pipeline.recipe import find_recipe, read_recipe


def test_all_mistakes_of_a_recipe_at_once(here, capsys):
    (here / "r.yaml").write_text(
        "fit:\n"
        "  model:\n"
        "    class_path: lenvm_lightning.TextLenVM\n"
        "    init_args: {backbone: tiny-text, gama: 0.9}\n"
        "  data:\n"
        "    class_path: datamodules.TextRolouts\n"
        "  trainer:\n"
        "    max_step: 3\n"
        "evalute: []\n"
    )
    assert main(["run", "r.yaml", "--fit.trainer.devises", "1"]) == 2
    err = capsys.readouterr().err
    for words in (
        "r.yaml:4: 'gama' is no setting of lenvm_lightning.TextLenVM; did you mean 'gamma'?",
        "r.yaml:6: class_path 'datamodules.TextRolouts' cannot be imported; did you mean 'datamodules.TextRollouts'?",
        "r.yaml:8: 'max_step' is no setting of the Trainer; did you mean 'max_steps'?",
        "r.yaml:9: 'evalute' is no stage",
        "--fit.trainer.devises: 'devises' is no setting of the Trainer; did you mean 'devices'?",
    ):
        assert words in err


RECIPE = """\
fit:
  model:
    class_path: lenvm_lightning.TextLenVM
    init_args:
      backbone: tiny-text
      optimizer:
        lr: fast
        betas: [0.9]
        lrr: 1.0e-3
      loss: mse
      lora: {rnk: 4, dropout: none}
      keep_layers: 2
      warmup_step: 5
  data:
    class_path: datamodules.TextRollouts
    init_args:
      max_length: long
      bucket: perhaps
  trainer:
    precision: 12
  checkpoint:
    keep: few
"""


def test_wrong_values_are_named_all_at_once(here, capsys):
    (here / "r.yaml").write_text(RECIPE)
    assert main(["run", "r.yaml", "--fit.trainer.max_epochs", "many"]) == 2
    err = capsys.readouterr().err
    for words in (
        "r.yaml:7: lr must be float, found 'fast'",
        "r.yaml:8: betas: ",
        "r.yaml:9: 'lrr' is no setting of optimizer; did you mean 'lr'?",
        "r.yaml:10: loss: expected settings (target, kind, weight, lam, censored), found 'mse'",
        "r.yaml:11: 'rnk' is no setting of lora; did you mean 'rank'?",
        "r.yaml:11: dropout must be float, found 'none'",
        "r.yaml:12: 'keep_layers' is no setting of lenvm_lightning.TextLenVM; it is 'backbone.keep_layers'",
        "r.yaml:13: 'warmup_step' is no setting of lenvm_lightning.TextLenVM; did you mean 'optimizer.warmup_steps'?",
        "r.yaml:17: max_length must be int, found 'long'",
        "r.yaml:18: bucket must be bool | None, found 'perhaps'",
        "r.yaml:20: precision must be ",
        "r.yaml:22: keep must be int, found 'few'",
        "--fit.trainer.max_epochs: max_epochs must be Optional[int], found 'many'",
    ):
        assert words in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"fit:\n  trainer: 3\n", "r.yaml:2: trainer: expected settings, found 3"),
        (b"fit: {}\n", "model: expected a class_path, such as lenvm_lightning.TextLenVM, found None"),
        (b"fit:\n  trainer:\n    max_steps: 3\n    max_steps: 5\n", "r.yaml:3: 'max_steps' is there again in line 4"),
        (b"\xff\xfe", "r.yaml is not valid YAML"),
        (RECIPE.partition("  data:")[0].encode(), "r.yaml:1: data: expected a class_path"),
    ],
)
def test_recipes_that_cannot_be(here, capsys, text, words):
    (here / "r.yaml").write_bytes(text)
    assert main(["run", "r.yaml"]) == 2
    assert words in capsys.readouterr().err


def test_a_subclass_takes_the_settings_of_its_base(here, monkeypatch, capsys):
    (here / "mine.py").write_text(
        "from lenvm_lightning import TextLenVM\n\n\n"
        "class Mine(TextLenVM):\n"
        "    def __init__(self, extra: int = 1, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
    )
    monkeypatch.syspath_prepend(here)
    command = ["run", "text_lenvm", "--allow-import", "mine"]
    command += ["--fit.model.class_path", "mine.Mine", "--fit.model.gama", "0.9"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "--fit.model.gama: 'gama' is no setting of mine.Mine; did you mean 'gamma'?" in err
    assert err.count("\n") == 2


# -- groups of settings -----------------------------------------------------------------------------------------------


def backbone_of(*overrides, recipe="text_lenvm") -> BackboneConfig:
    """What a recipe with these overrides is built on."""
    path = find_recipe(recipe)
    return parse_fit(read_recipe(path, list(overrides))["fit"], str(path)).model.settings.backbone


def test_a_name_stands_for_a_backbone(here):
    assert backbone_of() == BackboneConfig("tiny-text")
    assert backbone_of(("fit.model.backbone", "somewhere")) == BackboneConfig("somewhere")
    deep = ("fit.model.backbone.keep_layers", "2")
    assert backbone_of(deep) == BackboneConfig("tiny-text", keep_layers=2)
    assert backbone_of(deep, ("fit.model.backbone", "x")) == BackboneConfig("x", keep_layers=2)


def test_another_backbone_keeps_the_other_settings(here):
    found = backbone_of(("fit.model.backbone", "somewhere"), recipe="qwen2.5-1.5b")
    assert found == BackboneConfig("somewhere", gradient_checkpointing=True)


def test_short_and_long_forms_are_the_same_settings(here):
    """So that a run is found again, however its backbone is written."""
    found = []
    for backbone in ("tiny-text", {"source": "tiny-text"}):
        fit = {
            "model": {"class_path": "lenvm_lightning.TextLenVM", "init_args": {"backbone": backbone}},
            "data": {"class_path": "datamodules.TextRollouts"},
        }
        (here / "r.yaml").write_text(yaml.safe_dump({"fit": fit}))
        found.append(parse_fit(read_recipe(here / "r.yaml", [])["fit"], "r.yaml").settings)
    assert found[0] == found[1]
    assert found[0]["fit"]["model"]["init_args"]["backbone"]["freeze_vision"] is True


def test_groups_need_no_other_settings_to_be_there(here):
    (here / "r.yaml").write_text(
        "fit: {model: {class_path: lenvm_lightning.TextLenVM}, data: {class_path: datamodules.TextRollouts}}"
    )
    overrides = [("fit.model.backbone", "tiny-text"), ("fit.model.lora.rank", "4"), ("fit.model.loss.lam", "0.5")]
    settings = parse_fit(read_recipe(here / "r.yaml", overrides)["fit"], "r.yaml").model.settings
    assert (settings.lora.rank, settings.loss.lam) == (4, 0.5)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr", "1", "'lr' is no setting of lenvm_lightning.TextLenVM; it is 'optimizer.lr'"),
        ("gradient_checkpointing", "true", "it is 'backbone.gradient_checkpointing'"),
        ("target", "length", "it is 'loss.target'"),
        ("optimizer", "adamw_8bit", "expected settings (kind, lr, weight_decay, betas, warmup_steps), found 'adamw_8b"),
        ("loss", "bce", "loss: expected settings (target, kind, weight, lam, censored), found 'bce'"),
        ("loss.kind", "mae", "kind must be one of mse, "),
        ("loss.target", "log_lenght", "found 'log_lenght'; did you mean 'log_length'?"),
        ("optimizer.lrr", "1", "'lrr' is no setting of optimizer; did you mean 'lr'?"),
        ("backbone.keep_layer", "1", "'keep_layer' is no setting of backbone; did you mean 'keep_layers'?"),
        ("backbone.keep_layers", "two", "keep_layers must be int | None, found 'two'"),
        ("backbone", "3", "backbone: expected a name or settings (source, pretrained, "),
        ("backbone", "{keep_layers: 3}", "backbone: source is missing"),
        ("keep_layer", "1", "did you mean 'backbone.keep_layers'?"),
    ],
)
def test_a_wrong_override_says_where_the_setting_is(key, value, words):
    with pytest.raises(RecipeError) as told:
        read_recipe(find_recipe("text_lenvm"), [(f"fit.model.{key}", value)])
    assert f"--fit.model.{key}: " in str(told.value)
    assert words in str(told.value)


def test_a_mistake_in_a_short_form_has_its_line(here):
    text = find_recipe("text_lenvm").read_text(encoding="utf-8").replace("backbone: tiny-text", "backbone: [tiny-text]")
    (here / "r.yaml").write_text(text)
    line = text.splitlines().index("      backbone: [tiny-text]") + 1
    with pytest.raises(RecipeError, match=rf"r\.yaml:{line}: backbone: expected a name or settings"):
        read_recipe(here / "r.yaml", [])


def test_a_subclass_has_the_groups_of_its_base(here, monkeypatch):
    (here / "heir.py").write_text(
        "from lenvm_lightning import TextLenVM\n\n\n"
        "class Heir(TextLenVM):\n"
        "    def __init__(self, extra: int = 1, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
    )
    monkeypatch.syspath_prepend(here)
    overrides = [("fit.model.class_path", "heir.Heir"), ("fit.model.optimizer.lrr", "1"), ("fit.model.lr", "x")]
    with imports_from(["heir"]), pytest.raises(RecipeError) as told:
        read_recipe(find_recipe("text_lenvm"), overrides)
    assert "--fit.model.optimizer.lrr: 'lrr' is no setting of optimizer; did you mean 'lr'?" in str(told.value)
    assert "--fit.model.lr: 'lr' is no setting of heir.Heir; it is 'optimizer.lr'" in str(told.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.optimizer.betas", "[0.9, .inf]"), ("model.optimizer.weight_decay", ".inf"),
        ("model.optimizer.lr", ".nan"), ("model.optimizer.lr", "1e999"), ("model.optimizer.warmup_steps", ".inf"),
        ("model.gamma", ".nan"), ("model.backbone.overrides", "{rms_norm_eps: .inf}"), ("model.head_dropout", ".nan"),
        ("trainer.gradient_clip_val", ".inf"), ("trainer.limit_val_batches", ".nan"), ("data.val_share", ".nan"),
    ],
)  # fmt: skip
def test_numbers_are_finite(here, capsys, key, value):
    assert main(["run", "text_lenvm", "--check", f"--fit.{key}", value]) == 2
    name = key.rpartition(".")[2]
    found = capsys.readouterr().err
    assert f"--fit.{key}: {name} must be finite, found " in found


def test_a_number_that_is_not_finite_has_its_line(here):
    text = find_recipe("text_lenvm").read_text(encoding="utf-8").replace("lr: ", "lr: .inf  # ", 1)
    (here / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+: lr must be finite, found inf"):
        read_recipe(here / "r.yaml", [])


def test_whole_numbers_beyond_every_float(here, capsys):
    for key, value in (("model.optimizer.betas", f"[0.9, 1{'0' * 400}]"), ("model.optimizer.lr", f"1{'0' * 400}")):
        assert main(["run", "text_lenvm", "--check", f"--fit.{key}", value]) == 2
        assert f"--fit.{key}: {key.rpartition('.')[2]}" in capsys.readouterr().err
