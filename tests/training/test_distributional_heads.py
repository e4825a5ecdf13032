"""A distributional head beside the value: written and read, the same in every layout, and trained."""

import dataclasses
import json
import math

import lightning as L
import pytest
import torch
from gradients import QUIET, ROWS, TOLERANCE, FixedSplit, Gradients
from layouts import DECODER, exact, layouts_of, random_rows
from lightning.pytorch.callbacks import Callback
from modules import make_module
from transformers import AutoModel, LlamaConfig
from value_models import text_inputs

from lenvm_lightning import TextLenVM
from lenvm_lightning.distributions.heads import HeadConfig, make_rule, rule_to_plain
from lenvm_lightning.errors import CheckpointError, LenVMError, RecipeError
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.generators.local.loading import digest
from lenvm_lightning.training.batch_layouts import compute, row_outputs
from lenvm_lightning.training.layout_plan import make_plan
from lenvm_lightning.training.metrics import calibration_of

KINDS = ("bins", "quantiles", "discounts")
SHAPE = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}


def with_head(kind: str = "bins", size: int = 12) -> LenVMConfig:
    rule = make_rule(kind, size, 300, 40.0)
    assert rule is not None
    return LenVMConfig(gamma=0.99, length_head=rule_to_plain(rule))


def module_of(head: HeadConfig, **settings):
    return make_module(
        TextLenVM, "tiny-text", pretrained=False, overrides=SHAPE, lr=3e-3, warmup_steps=0, head=head, **settings
    )


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def fit(module, data, steps: int, callbacks=(), **options):
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks), limit_val_batches=0,
        **{**QUIET, **options},
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_beside_the_published_layout_and_read_again(tmp_path, kind):
    torch.manual_seed(0)
    model = LengthValueModel.from_backbone("tiny-text", with_head(kind), pretrained=False, expected_length=30.0).eval()
    model.save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path)
    inputs = text_inputs("right")
    with torch.no_grad():
        outputs = model(**inputs, all_heads=True)
        assert torch.equal(loaded(**inputs, all_heads=True), outputs)
        assert torch.equal(loaded(**inputs), outputs[..., 0])
    assert outputs.shape == (*inputs["input_ids"].shape, 1 + model.length_rule.size)
    assert float(loaded.distribution(outputs).median().mean()) == pytest.approx(30 * 0.69, rel=0.25)
    # Whoever knows nothing of it reads the value alone.
    (tmp_path / "length_head.safetensors").unlink()
    config = json.loads((tmp_path / "lenvm_config.json").read_text(encoding="utf-8"))
    (tmp_path / "lenvm_config.json").write_text(json.dumps({**config, "length_head": {}}), encoding="utf-8")
    alone = LengthValueModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(alone(**inputs), outputs[..., 0])
        assert alone(**inputs, all_heads=True).shape == (*inputs["input_ids"].shape, 1)
    with pytest.raises(CheckpointError, match="predicts one number, and does not say how sure"):
        alone.distribution(outputs)


def test_a_head_that_is_missing_or_does_not_fit_is_refused(tmp_path):
    model = LengthValueModel.from_backbone("tiny-text", with_head(), pretrained=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "lenvm_config.json").read_text(encoding="utf-8"))
    for change, wanted in (({"edges": [0, 5]}, "does not fit it"), ({"edges": [5, 0]}, "ascending")):
        changed = {**config, "length_head": {**config["length_head"], **change}}
        (tmp_path / "lenvm_config.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(CheckpointError, match=wanted):
            LengthValueModel.from_pretrained(tmp_path)
    (tmp_path / "lenvm_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "length_head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"length_head.safetensors is missing .* to use the value alone"):
        LengthValueModel.from_pretrained(tmp_path)


def test_another_head_is_another_model(tmp_path):
    """Results of an evaluation are kept under the digest of the models."""
    model = LengthValueModel.from_backbone("tiny-text", with_head(), pretrained=False)
    model.save_pretrained(tmp_path)
    before = digest(str(tmp_path))
    with torch.no_grad():
        model.length_head.out.bias += 1.0
    model.save_pretrained(tmp_path)
    assert digest(str(tmp_path)) != before


def test_the_value_starts_as_it_would_without_it():
    models = []
    for config in (LenVMConfig(gamma=0.99), with_head()):
        torch.manual_seed(3)
        models.append(LengthValueModel.from_backbone("tiny-text", config, pretrained=False, expected_length=20.0))
    plain, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(other[name], tensor) for name, tensor in plain.items())
    assert set(other) - set(plain) == {"length_head.fc.weight", "length_head.fc.bias", "length_head.out.weight",
                                       "length_head.out.bias"}  # fmt: skip


@pytest.mark.parametrize("way", ["cache", "tree", "packed"])
def test_outputs_are_the_same_in_every_layout(way):
    torch.manual_seed(0)
    backbone = AutoModel.from_config(LlamaConfig(**DECODER), attn_implementation="sdpa").double()
    model = exact(LengthValueModel(backbone, with_head())).eval()
    batches = layouts_of(random_rows())
    plain, batch = batches["rows"], batches["packed" if way == "packed" else "shared"]
    with torch.no_grad():
        theirs = row_outputs(model, plain)
        ours = compute(model, batch, make_plan(batch["layout"], [way], ordered=False))
    assert theirs[..., 1:].std() > 0.05
    assert (ours - theirs)[plain["attention_mask"].bool()].abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_its_loss_falls(text_rollouts, kind):
    L.seed_everything(0, verbose=False)
    losses = Losses()
    fit(module_of(HeadConfig(kind)), FixedSplit(text_rollouts, [list(range(ROWS))]), 12, [losses])
    assert losses.seen[-1] < 0.9 * losses.seen[0]


def test_detached_it_leaves_the_value_as_it_is_without_it(text_rollouts):
    """Not with gradients clipped: their norm is of both."""

    def trained(head: HeadConfig):
        L.seed_everything(0, verbose=False)
        module = module_of(head)
        fit(module, FixedSplit(text_rollouts, [list(range(ROWS))]), 4)
        return dict(module.lenvm.named_parameters())

    alone, beside = trained(HeadConfig()), trained(HeadConfig("bins", detached=True))
    for name, tensor in alone.items():  # as a column of two heads' outputs it is added up in another order
        torch.testing.assert_close(beside[name], tensor, rtol=0.0, atol=1e-6, msg=name)
    together = trained(HeadConfig("bins"))
    assert (together["v_head.fc.weight"] - alone["v_head.fc.weight"]).abs().max() > 1e-3


def test_a_split_batch_gives_the_gradient_of_the_whole(text_rollouts):
    gradients = []
    for batches in ([list(range(ROWS))], [list(range(5)), list(range(5, ROWS))]):
        L.seed_everything(0, verbose=False)
        options = {"accumulate_grad_batches": len(batches), "precision": "64-true"}
        data = FixedSplit(text_rollouts, batches)
        fit(module_of(HeadConfig("bins"), dtype="float64"), data, 1, [seen := Gradients()], **options)
        gradients += seen.seen
    whole, split = gradients
    assert (whole - split).norm() / whole.norm() < TOLERANCE


def test_settings_are_checked_before_anything_is_loaded():
    with pytest.raises(RecipeError, match=r"head\.size must lie between 2 and 1024"):
        module_of(HeadConfig("bins", size=1))
    module = module_of(HeadConfig("bins"), gamma=0.99)
    with pytest.raises(LenVMError, match=r"head\.kind: bins needs a DataModule that knows the lengths"):
        module.configure_model()
    assert dataclasses.asdict(module.settings)["head"]["kind"] == "bins"


def test_what_is_no_number_is_not_calibrated():
    states = torch.zeros(25, 5, dtype=torch.float64)
    states[:, 4] = torch.arange(25)
    assert calibration_of({"states": states}) is not None
    states[3, :2] = math.nan
    assert calibration_of({"states": states}) is None
    assert calibration_of({}) is None
