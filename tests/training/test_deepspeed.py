"""DeepSpeed's ZeRO in two processes trains what DDP trains, keeps it, and leaves the ordinary model directory."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from gradients import relative
from harm import Harm
from ranks import RANKS, drive, fit_of, load, same_after_a_kill

from lenvm_lightning import LengthValueModel
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import CheckpointError, RecipeError
from lenvm_lightning.pipeline.fit_stage import parse_fit
from lenvm_lightning.pipeline.run_folder import RunFolder
from lenvm_lightning.training.fsdp import full_weights
from lenvm_lightning.training.load_checkpoint import model_of_checkpoint
from lenvm_lightning.training.strategies import name_of

ROUNDING = 1e-6  # of sums in float32; the mean of the micro-batches' means is half a gradient away


def two_ranks(folder: Path, text: Path, vision: Path, names: list[str]) -> Path:
    """What two ranks found, see two_zero.py."""
    pytest.importorskip("deepspeed")
    return drive("two_zero.py", folder, text, vision, names)


@pytest.fixture(scope="module")
def two(tmp_path_factory, text_rollouts, vision_rollouts):
    return two_ranks(
        tmp_path_factory.mktemp("zero"), text_rollouts, vision_rollouts, ["steps", "metrics", "whole-3", "adapters-2"]
    )


@pytest.fixture(scope="module")
def more(tmp_path_factory, text_rollouts, vision_rollouts):
    names = ["images", "layouts", "whole-1", "whole-2", "offloaded-2", "offloaded-3", "adapters-3"]
    return two_ranks(tmp_path_factory.mktemp("more"), text_rollouts, vision_rollouts, names)


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("rank", RANKS)
def test_steps_are_those_of_ddp(two, rank, stage, clip):
    """Micro-batches of different numbers of tokens, and a short last window."""
    found = load(two / f"steps-{rank}.pt")
    here, there = found[f"{stage} {clip}"], found[f"ddp {clip}"]
    assert here["steps"] == there["steps"] == 3
    assert relative(here["change"], there["change"]) < ROUNDING


@pytest.mark.slow
def test_the_mean_of_means_is_another_one(two):
    found = load(two / "steps-0.pt")
    assert relative(found["naive"]["change"], found["ddp None"]["change"]) > 0.1
    assert relative(found["ddp 0.01"]["change"], found["ddp None"]["change"]) > 0.1  # it does clip


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_metrics_are_those_of_ddp(two, stage):
    expected, found = (json.loads((two / f"metrics-{name}.json").read_text()) for name in ("ddp", stage))
    assert {"val/loss", "val/mre", "val/mae_tokens/start"} < set(found["alone"])
    assert found["alone"] == pytest.approx(expected["alone"], rel=1e-6)
    assert found["trained"] == pytest.approx(expected["trained"], rel=1e-3)  # after two steps in bfloat16
    assert found["trained"] != found["alone"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", RANKS)
def test_images_in_one_rank_only(more, rank):
    found = load(more / f"images-{rank}.pt")
    assert all(relative(found[stage], found["ddp"]) < ROUNDING for stage in ("1", "2"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", RANKS)
def test_shared_prompts(more, rank):
    found = load(more / f"layouts-{rank}.pt")
    assert all(relative(found[stage], found["ddp"]) < 1e-5 for stage in ("2", "3"))


# -- what is kept -----------------------------------------------------------------------------------------------------


def same_from_a_checkpoint(folder: Path, kind: str) -> None:
    """A run that goes on ends as one that was not interrupted, and so do its checkpoint and its model directory."""
    through, resumed = (load(folder / f"{kind}-{name}.pt") for name in ("through", "resumed"))
    assert all(torch.equal(resumed[key], through[key]) for key in through)
    last, earlier = (full_weights(folder / kind / f"step-00000000{step}.ckpt") for step in (4, 2))
    trained = {key for key in through if "lora_" in key or "v_head" in key or "adapters" not in kind}
    assert set(last) == set(earlier) == trained
    assert all(torch.equal(last[key], through[key]) and not torch.equal(earlier[key], through[key]) for key in trained)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        kept = model_of_checkpoint(folder / kind / "step-000000004.ckpt")(ids, torch.ones_like(ids))
        left = LengthValueModel.from_pretrained(folder / f"{kind}-model", dtype="float32")(ids, torch.ones_like(ids))
    assert torch.equal(kept, left)
    found = json.loads((folder / f"{kind}-validated.json").read_text())
    assert found["from the checkpoint"] == pytest.approx(found["trained"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole-3", "adapters-2"])
def test_going_on_from_a_checkpoint(two, kind):
    same_from_a_checkpoint(two, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole-1", "whole-2", "offloaded-2", "offloaded-3", "adapters-3"])
def test_going_on_from_other_checkpoints(more, kind):
    same_from_a_checkpoint(more, kind)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_killed_recipe(tmp_path, text_rollouts, vision_rollouts, strategy, capsys):
    two_ranks(tmp_path, text_rollouts, vision_rollouts, [strategy])
    same_after_a_kill(tmp_path / strategy)
    stopped = RunFolder(tmp_path / strategy / "killed")
    stopped.results.unlink()
    assert main(["export", str(stopped.path), str(tmp_path / "exported")]) == 0
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "exported" / name).read_bytes() == (stopped.model / name).read_bytes()


@pytest.mark.slow
def test_checkpoints_run_no_code_and_are_whole(two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "step-000000004.ckpt"
    shutil.copytree(two / "whole-3" / copy.name, copy)
    shard = copy / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(shard, weights_only=False)
    with shard.open("wb") as file:
        torch.save({**state, "more": Harm()}, file, pickle_module=pickle)
    with pytest.raises(CheckpointError, match=r"cannot be read safely: it holds posix\.system"):
        full_weights(copy)
    shard.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="cannot be read safely: it is damaged"):
        full_weights(copy)
    assert not (tmp_path / "harmed").exists()
    shard.unlink()
    with pytest.raises(CheckpointError, match="is not whole: it holds what 1 of its ranks wrote"):
        full_weights(copy)


# -- without ranks ----------------------------------------------------------------------------------------------------


def test_a_trainer_is_built_for_each_name(tmp_path):
    pytest.importorskip("deepspeed")
    cli = parse_fit(fit_of("deepspeed_stage_3_offload"), "r.yaml")
    trainer = cli.build_trainer(RunFolder(tmp_path), None)
    assert name_of(trainer.strategy) == "deepspeed_stage_3_offload"
    assert trainer.strategy.config["zero_optimization"]["offload_param"]["device"] == "cpu"
    for strategy, words in (("deepspeed_stage_4", "there are deepspeed, deepspeed_stage_1"), ("deepspeed", "TinyLang")):
        model = "lenvm_lightning.tinyworld.language_model.TinyLanguageModel"
        fit = (
            fit_of(strategy)
            if "4" in strategy
            else fit_of(strategy, model, "lenvm_lightning.tinyworld.datamodule.TinyCorpus")
        )
        with pytest.raises(RecipeError, match=words):
            parse_fit(fit, "r.yaml").build_trainer(RunFolder(tmp_path), None)


def test_without_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setattr("lenvm_lightning.training.deepspeed.RequirementCache", lambda name: False)
    with pytest.raises(RecipeError, match=r'pip install "lenvm-lightning\[deepspeed\]"'):
        parse_fit(fit_of("deepspeed"), "r.yaml").build_trainer(RunFolder(tmp_path), None)
