"""Length tokens: residuals by hand, words, rankings, and what the shipped generator's words say."""

import math

import numpy as np
import pytest
import torch

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.evaluation.length_tokens import DIRECTIONS, LengthTokens, Words, plot_words, residuals
from lenvm_lightning.evaluation.plots import as_pixels, as_png
from lenvm_lightning.inspection.rollout_values import values_of
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.objectives import LengthTarget
from lenvm_lightning.rollouts.generators.interface import PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.tinyworld.prompt_sets import prompt_set

RULE = LengthTarget("discounted", 0.5)


def logits_of(remaining):
    """Logits that predict these remaining tokens at gamma 0.5."""
    value = 1 - 0.5 ** np.asarray(remaining, dtype=float)
    return torch.from_numpy(np.log(np.maximum(value, 1e-300)) - np.log1p(-np.minimum(value, 1 - 1e-15)))


def test_residuals_by_hand():
    # delta_t = -1/2 + V_t / 2 - V_{t-1}; a prediction after EOS does not count.
    value = np.array([-0.75, -0.5, -0.75, -0.3])
    assert residuals(value, 0.5, ended=True).tolist() == [0.0, -0.375, 0.25]
    assert residuals(value, 0.5, ended=False).tolist() == pytest.approx([0.0, -0.375, 0.10])
    # 0.75 is two tokens to go. After one of them it is one, as expected: 0. Then two are expected where none should be
    # left: it goes on longer. Then it ends although two were expected: sooner.


@pytest.mark.parametrize("ended", [True, False])
def test_discounted_residuals_telescope(ended):
    value, gamma = -np.random.default_rng(0).uniform(0, 1, 9), 0.9
    delta = residuals(value, gamma, ended)
    end = 0.0 if ended else value[-1]  # the return of s_0, bootstrapped where it was truncated
    assert gamma ** np.arange(8) @ delta == pytest.approx(-(1 - gamma**8) + gamma**8 * end - value[0], rel=1e-12)


def test_a_calibrated_model_has_mean_residual_zero(tiny_text):
    random, end, gamma = np.random.default_rng(0), 0.1, 0.9  # the end comes at every token with the same chance
    survival = end * gamma / (1 - (1 - end) * gamma)  # E[gamma ** remaining], before any token but EOS
    logit = math.log((1 - survival) / survival)
    found, biased = (LengthTokens(tiny_text, LengthTarget("discounted", gamma)) for _ in range(2))
    eos = tiny_text.eos_token_id
    for number, length in enumerate(random.geometric(end, 600)):
        ids = [500] * (int(length) - 1) + [eos]
        found.add(str(number), ids, torch.full((int(length) + 1,), logit), True)
        biased.add(str(number), ids, torch.full((int(length) + 1,), logit + 1.0), True)
    report = found.compute()
    assert abs(report.mean_residual) < 3 * report.stderr < 0.02
    assert biased.compute().mean_residual > 4 * report.stderr  # expects too much: on average the end comes sooner


def test_words_of_several_tokens(tiny_text):
    text = "Wait, wait. Hmm\n\nTherefore \\boxed{12}: ✅é 等于"
    ids = [*tiny_text(text)["input_ids"], tiny_text.eos_token_id]
    assert len(tiny_text.tokenize("Wait")) > 1  # else there is nothing to join
    words = Words(tiny_text).split(ids)
    assert [start for _, start, *_ in words] == [0, *(stop for _, _, stop, _ in words)][:-1]
    assert words[-1][2:] == (len(ids), True)
    assert [special for *_, special in words] == [False] * (len(words) - 1) + [True]
    said = [word for word, *_ in words]
    for word in ("wait", ",", "hmm", "\\n\\n", "therefore", "1", "2", "等", "于"):
        assert word in said, said
    assert said.count("wait") == 2
    assert not any("\ufffd" in word for word in said)
    assert any("✅" in word for word in said)


def test_effects_by_hand(tiny_text):
    wait = tiny_text("Wait")["input_ids"]
    assert len(wait) == 2
    stop, eos = tiny_text(".")["input_ids"][0], tiny_text.eos_token_id
    found = LengthTokens(tiny_text, RULE)
    # Remaining as predicted at s_0 … s_4, for "W", "ait", ".", EOS.
    found.add("a", [*wait, stop, eos], logits_of([1, 1, 2, 1, 5]), True)
    found.add("b", [*wait, stop, eos], logits_of([4, 3, 2, 1, 0]), True)
    # Values of a: -1/2, -1/2, -3/4, -1/2, 0: residuals -1/4, -3/8, 0, 0. The word: -1/4 - 3/16. All of b are 0.
    report = found.compute(threshold=0.01, minimum=2)
    effects = {effect.word: effect for effect in report.words}
    assert report.mean_residual == pytest.approx(-5 / 64)
    assert report.stderr == pytest.approx(5 / 64)
    said = effects["wait"]
    assert (said.count, said.prompts, said.direction) == (2, 2, "goes on longer")
    assert said.mean_residual == pytest.approx(-7 / 32)
    assert said.stderr == pytest.approx(7 / 32)  # -7/16 and 0
    assert said.z == pytest.approx(-1.0)
    assert (said.share_longer, said.share_sooner) == (0.5, 0.0)
    assert effects["."].mean_residual == pytest.approx(0.0, abs=1e-12)
    assert [effect.word for effect in report.words if effect.special] == [tiny_text.eos_token]
    assert [effect.word for effect in report.ranking("goes on longer")][:1] == ["wait"]
    assert found.compute(minimum=3).ranking("goes on longer") == []


def test_a_truncated_completion_has_no_end(tiny_text):
    found = LengthTokens(tiny_text, RULE)
    found.add("a", [tiny_text(".")["input_ids"][0]], logits_of([3, 2]), False)
    assert found.compute().mean_residual == pytest.approx(0.0, abs=1e-9)


def test_mistakes(tiny_text):
    found = LengthTokens(tiny_text, RULE)
    with pytest.raises(ValueError, match="no completions"):
        found.compute()
    with pytest.raises(ValueError, match="2 tokens have 3 states, at least 2; got 2"):
        found.add("a", [1, 2], logits_of([3, 2]), True)
    found.add("a", [5, 6], logits_of([2, 1, 0]), True)
    report = found.compute()
    assert report.chance_z is None  # nothing is frequent enough to be ranked
    with pytest.raises(ValueError, match="no ranking of 'shorter' by 'mean'"):
        report.ranking("shorter")


@pytest.fixture(scope="module")
def report(tiny_text):
    """Words of 200 completions of the shipped generator, as the shipped value model sees them."""
    lenvm, generator = LengthValueModel.from_pretrained("tiny-text-lenvm"), LocalGenerator.load("tiny-text")
    prompts = {prompt.prompt_id: prompt for prompt in prompt_set("tiny-math", "test", 50)}
    requests = [PromptRequest(prompt, (0, 1, 2, 3)) for prompt in prompts.values()]
    answers = list(generator.sample(requests, SamplingParams(max_tokens=768)))
    pairs = [(prompts[answer.prompt_id], answer.result.token_ids) for answer in answers]
    found = LengthTokens(tiny_text, lenvm.config.rule)
    for number, logits in values_of(lenvm, load_processor("tiny-text"), pairs):
        prompt, ids = pairs[number]
        found.add(prompt.prompt_id, ids, logits, answers[number].result.finish_reason == "stop")
    return found.compute()


def test_detours_go_on_longer_and_closings_end_sooner(report):
    words = {effect.word: effect for effect in report.words}
    for word in ("wait", "hmm", "first"):  # of detours, and of the long way to tell it
        assert words[word].direction == "goes on longer"
        assert words[word].z < -2 * report.chance_z
        assert words[word].share_longer > 0.9 > 0.1 > words[word].share_sooner
    assert words["therefore"].direction == "ends sooner"
    assert words["therefore"].z > 1.5 * report.chance_z
    top = {direction: [effect.word for effect in report.ranking(direction, top=4)] for direction in DIRECTIONS}
    assert {"wait", "hmm"} <= set(top["goes on longer"])
    assert "therefore" in top["ends sooner"]
    shares = [effect.word for effect in report.ranking("goes on longer", "share", 4)]
    assert {"wait", "hmm"} <= set(shares)
    assert 2 < report.chance_z < 5
    assert abs(report.mean_residual) < 0.001
    most = {effect.word for effect in report.words[:3]}  # what counts alone would list
    assert not most & {"wait", "hmm", "therefore"}


def test_clouds(report):
    figures = [plot_words(report, "tiny world"), plot_words(report, "tiny world"), plot_words(report, by="share")]
    first, again, shares = map(as_pixels, figures)
    assert (first == again).all()
    assert first.shape != shares.shape or (first != shares).any()
    assert (first[60:, :540] < 200).any()  # something is drawn on either side
    assert (first[60:, 560:] < 200).any()


def test_a_cloud_of_nothing(tiny_text):
    found = LengthTokens(tiny_text, RULE)
    found.add("a", [5, 6], logits_of([2, 1, 0]), True)
    assert len(as_png(plot_words(found.compute()))) > 1000
