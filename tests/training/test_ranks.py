"""Two processes compute what one does, keep it when they are killed, and leave the ordinary model directory."""

import json

import pytest
import torch
from gradients import ROWS, TOLERANCE, gradient, relative
from ranks import RANKS, drive, load, same_after_a_kill

from lenvm_lightning import LengthValueModel
from lenvm_lightning.training.fsdp import full_weights, is_sharded
from lenvm_lightning.training.load_checkpoint import model_of_checkpoint


@pytest.fixture(scope="module")
def alone(text_rollouts):
    """The gradient of one process on all rows at once."""
    return gradient(text_rollouts, [list(range(ROWS))])[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory, text_rollouts, vision_rollouts, alone):
    """The folder of what two ranks found."""
    names = ["gradients", "metrics", "shards"]
    return drive("two_ranks.py", tmp_path_factory.mktemp("two"), text_rollouts, vision_rollouts, names)


@pytest.fixture(scope="module")
def rarer(tmp_path_factory, text_rollouts, vision_rollouts):
    """The folder of what takes two ranks longer."""
    names = ["precisions", "images", "adapters", "whole", "halved", "fsdp", "ddp"]
    return drive("two_ranks.py", tmp_path_factory.mktemp("rarer"), text_rollouts, vision_rollouts, names)


@pytest.fixture
def folder_of(request):
    """The folder in which a kind of checkpoint lies."""
    return lambda kind: request.getfixturevalue("two" if kind == "shards" else "rarer")


def with_slow(kinds):
    """Kinds of checkpoints as parameters of a test: all but the shards are slow."""
    return [kind if kind == "shards" else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("way", ["ddp", "fsdp", "recomputed"])
@pytest.mark.parametrize("rank", RANKS)
def test_gradient(two, alone, way, rank):
    """Ranks with different numbers of tokens, and two micro-batches each."""
    assert relative(load(two / f"gradients-{rank}.pt")[way], alone) < TOLERANCE


@pytest.mark.parametrize("way", ["clipped", "clipped ddp"])
def test_clipping_goes_by_the_norm_of_all_ranks(two, text_rollouts, alone, way):
    clipped = load(two / "gradients-0.pt")[way]
    assert float(alone.norm()) > 0.02  # else it clips nothing
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)
    assert relative(clipped * (alone.norm() / clipped.norm()), alone) < TOLERANCE


def test_activations_are_recomputed(two):
    """Two micro-batches of one layer: forward, and once more on the way back."""
    found = load(two / "gradients-0.pt")
    assert (found["fsdp: calls"], found["recomputed: calls"]) == (2, 4)


@pytest.mark.slow
def test_precisions(rarer):
    """Layers are gathered in bfloat16, the head is not, and no precision loses the float32 of the logits."""
    whole, half = "torch.float32", "torch.bfloat16"
    found = load(rarer / "precisions-0.pt")
    exact = found["32-true"].pop("gradient")
    assert set(found["32-true"].values()) == {whole}
    for precision, inside in (("bf16-mixed", whole), ("bf16-true", half)):
        assert 1e-5 < relative(found[precision].pop("gradient"), exact) < 0.1
        assert found[precision] == {
            "inside": half, "head": whole, "logits": whole, "gradient inside": inside, "gradient of the head": whole
        }  # fmt: skip


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_metrics(two, text_rollouts, way):
    from two_ranks import validated

    expected = validated(str(text_rollouts), accelerator="cpu")
    found = json.loads((two / f"metrics-{way}.json").read_text())
    assert {"val/loss", "val/mre", "val/mae_tokens/start"} < set(found)
    assert found == pytest.approx(expected, rel=1e-6)  # float32 logits of rows in other batches


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [True, False])
def test_only_one_rank_has_images(rarer, vision_rollouts, freeze):
    from two_ranks import mixed_gradient

    expected = mixed_gradient(str(vision_rollouts), freeze, accumulate_grad_batches=2)
    assert float(expected.norm()) > 0
    for rank in RANKS:
        found = load(rarer / f"images-{rank}.pt")
        for way in ("fsdp", "ddp"):
            assert relative(found[f"{way} {freeze}"], expected) < TOLERANCE


@pytest.mark.parametrize("kind", with_slow(["adapters", "shards", "whole", "halved"]))
def test_going_on_from_a_checkpoint(folder_of, kind):
    """A folder of shards, or one file: weights are those of the run that was not interrupted, dropout included."""
    folder = folder_of(kind)
    through, resumed = (load(folder / f"{kind}-{name}.pt") for name in ("through", "resumed"))
    assert all(torch.equal(resumed[key], through[key]) for key in through)
    stored = full_weights(folder / kind / "step-000000004.ckpt")
    trained = {key for key in through if "lora_" in key or "v_head" in key or kind != "adapters"}
    assert set(stored) == trained  # whoever trains adapters keeps only what is trained
    assert all(torch.equal(stored[key], through[key]) for key in trained)
    earlier = full_weights(folder / kind / "step-000000002.ckpt")
    assert all(not torch.equal(earlier[key], through[key]) for key in trained)
    assert (folder / kind / "step-000000004.ckpt").is_dir() == (kind != "whole")


@pytest.mark.parametrize("kind", with_slow(["adapters", "shards", "whole"]))
def test_models_of_ranks(folder_of, kind):
    """The model directory, and the newest checkpoint, give what the ranks computed together."""
    folder = folder_of(kind)
    ids = torch.arange(40, 60)[None]
    expected = load(folder / f"{kind}-logits.pt")
    for model in (
        LengthValueModel.from_pretrained(folder / f"{kind}-model", dtype="float32"),
        model_of_checkpoint(folder / kind / "step-000000004.ckpt"),
    ):
        assert not is_sharded(model)
        with torch.no_grad():
            assert torch.equal(model.eval()(ids, torch.ones_like(ids)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_killed_recipe(rarer, strategy):
    same_after_a_kill(rarer / strategy)
