"""What controls do to the shipped pair: lengths are met, answers stay right. Few samples; the benchmark takes many."""

import runpy

import pytest
from places import BENCHMARKS

from lenvm_lightning import tinyworld
from lenvm_lightning.models.value_model import LengthValueModel

BENCHMARK = BENCHMARKS / "control.py"


@pytest.fixture(scope="module")
def control():
    return runpy.run_path(str(BENCHMARK))


@pytest.fixture(scope="module")
def sampler(control, tmp_path_factory):
    return control["Sampler"](tmp_path_factory.mktemp("points"), samples=30, seeds=2)


def test_value_models_are_small_and_load_in_single_precision():
    for name in tinyworld.VALUE_MODELS:
        weights = sum(file.stat().st_size for file in tinyworld.path(name).glob("*.safetensors"))
        assert weights <= 4_000_000
        lenvm = LengthValueModel.from_pretrained(name)
        assert {str(parameter.dtype) for parameter in lenvm.parameters()} == {"torch.float32"}
        assert lenvm.gamma == 0.99


def test_equal_to_lands_and_reads_like_the_base_model(control, sampler):
    base = control["score_constraint"](sampler, "equal to", "base model", 64, None)
    ours = control["score_constraint"](sampler, "equal to", "EqualTo(n)", 64, control["EqualTo"](64))
    assert base[1] < 70 < 85 < ours[1]
    assert ours[3] < 0.08 < base[3]
    assert ours[4] > base[4] - 0.15


def test_limits_are_kept_and_used(control, sampler):
    most = control["score_constraint"](sampler, "at most", "AtMost(n)", 64, control["AtMost"](64))
    least = control["score_constraint"](sampler, "at least", "AtLeast(n)", 64, control["AtLeast"](64))
    assert min(most[1], least[1]) > 95
    assert 0.6 < most[5] < 1 < least[5] < 1.4


def test_seeds_have_prompts_of_their_own_or_none(control):
    prompts = [control["prompts_with"]("at most", 64, 67, seed) for seed in range(3)]
    assert len({prompt.messages[0]["content"] for part in prompts for prompt in part}) == 201
    with pytest.raises(SystemExit, match="use fewer --samples"):
        control["prompts_with"]("at most", 64, 67, 3)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["stories", "images"])
def test_tilt_shortens_without_loss(control, sampler, part, monkeypatch):
    monkeypatch.setitem(control["score_trade"].__globals__, "BETAS", (-10.0,))
    lines, curves = control["score_trade"](sampler, [part])
    [(tokens, right, _)] = curves[part]["tilt"]
    lengths, passes = curves[part]["budget"]
    assert tokens < 0.65 * lengths[-1]
    assert right > passes[-1] - 0.1
    assert "Tilt(-10)" in lines[-1]
    control["plot"](curves, sampler.out / "frontier.png")
    assert (sampler.out / "frontier.png").stat().st_size > 5_000
