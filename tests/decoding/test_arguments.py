"""Guided decoding as people get it wrong: told by name before anything runs, and one bad row fails alone."""

import math

import numpy as np
import pytest
import torch
from pairs import PROMPTS, prompts_of, random_ids, settings
from tiny_generators import build
from transformers import AutoModelForCausalLM, Qwen2Config

from lenvm_lightning.decoding.batched_controls import per_row
from lenvm_lightning.decoding.generate import generate, stream
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Tilt
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator


@pytest.fixture(scope="module")
def models():
    lenvm = LengthValueModel.from_backbone("tiny-text", LenVMConfig(gamma=0.99), pretrained=False, dtype="float64")
    return build("tiny-text", torch.float64, eos_bias=6.0), lenvm.eval()


def ids_of(completions):
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": "Tell me."}, "list of token ids for each prompt; got 'Tell me.'"),
        ({"inputs": ["Tell me."]}, "list of token ids for each prompt"),
        ({"inputs": [5, 6, 7]}, "list of token ids for each prompt"),
        ({"inputs": {"text": 1}}, "list of token ids for each prompt; got text"),
        ({"inputs": torch.tensor([5, 6])}, r"must have the shape \(prompts, tokens\), got \(2,\)"),
        ({"inputs": {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}}, "attention_mask must"),
        ({"inputs": [[5, 2048]]}, "no prompt can be answered: inputs: the models know no token 2048"),
        ({"lenvm": "tiny-text-lenvm"}, "lenvm must be a length value model, got tiny-text-lenvm"),
        ({"control": EqualTo}, "control <class .*EqualTo'> of prompt 0 is none"),
        ({"control": EqualTo(torch.tensor([3, 9]))}, "control has numbers for several rows"),
        ({"control": Gated(Tilt(torch.tensor([3.0, 9.0])))}, "control has numbers for several rows"),
        ({"control": per_row([EqualTo(3), EqualTo(9)])}, "control has numbers for several rows"),
        ({"n": 1.5}, "n must be at least 1 completion, whole; got 1.5"),
        ({"max_tokens": 6.5}, "max_tokens must be at least 1, whole; got 6.5"),
        ({"seed": None}, "seed must be a whole number, found None"),
        ({"temperature": "hot"}, "temperature must be a number of at least 0, found 'hot'"),
        ({"stop": ["", "x"], "tokenizer": object()}, "stop has an empty string"),
    ],
)
def test_they_are_named(models, changes, words):
    arguments = {"generator": models[0], "lenvm": models[1], "inputs": PROMPTS, "control": EqualTo(5), **changes}
    with pytest.raises(GenerationError, match=words):
        generate(**arguments)
    with pytest.raises(GenerationError, match=words):
        stream(**arguments)  # at once, not with the first token


def test_lists_tensors_and_arrays_are_as_good(models):
    expected = ids_of(generate(*models, PROMPTS, control=EqualTo(9), temperature=[0.5, 1.5]))
    padded = {"input_ids": [[5, 6, 7], [0, 8, 9]], "attention_mask": [[1, 1, 1], [0, 1, 1]]}
    assert ids_of(generate(*models, padded, control=EqualTo(np.int64(9)), temperature=np.array([0.5, 1.5]))) == expected
    rows = [torch.tensor(prompt) for prompt in PROMPTS]
    controls = [EqualTo(torch.tensor(9)), EqualTo(9)]
    assert ids_of(generate(*models, rows, control=controls, temperature=torch.tensor([0.5, 1.5]))) == expected


def test_a_limit_inside_a_gate_may_lie_above_max_tokens(models):
    assert len(generate(*models, PROMPTS, control=Gated(AtMost(99)), max_tokens=2)) == 2


def test_tokens_that_the_models_do_not_know_fail_alone(models):
    expected = generate(*models, PROMPTS, control=EqualTo(9), seed=[1, 2])
    completions = generate(*models, [PROMPTS[0], [5, 99_999], PROMPTS[1], [-1]], control=EqualTo(9), seed=[1, 0, 2, 0])
    assert [completion.error for completion in completions[1::2]] == [
        "inputs: the models know no token 99999, only 2,048 tokens",
        "inputs: the models know no token -1, only 2,048 tokens",
    ]
    assert ids_of(completions[::2]) == ids_of(expected)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_controls_that_leave_nothing_fail_their_own_rows(models, factor):
    expected = generate(*models, PROMPTS, control=EqualTo(9), seed=[1, 2])
    controls = [EqualTo(9), lambda probs, remaining, generated, gamma: factor * probs]
    completions = generate(*models, PROMPTS, control=controls, seed=[1, 2])
    assert completions[0].token_ids == expected[0].token_ids
    assert (completions[1].finish_reason, completions[1].token_ids) == ("error", [])
    assert "probabilities under the control" in completions[1].error


def test_a_control_cannot_bring_back_what_truncation_left_out(models):
    def all_alike(probs, remaining, generated, gamma):
        return torch.ones_like(probs)

    settings = {"control": [Tilt(1.0), all_alike], "top_k": [15, 2], "n": 8, "max_tokens": 6, "trace": True}
    for completion in generate(*models, PROMPTS, **settings)[8:]:
        assert all(step.token_id in step.candidates for step in completion.trace)
        assert {len(step.candidates) for step in completion.trace} == {2}


def test_a_control_of_another_shape_is_refused(models):
    with pytest.raises(GenerationError, match="must return a probability for each candidate"):
        generate(*models, PROMPTS, control=lambda probs, remaining, generated, gamma: probs[:, :1])


def test_nothing_follows_an_end_in_an_unguided_row_either(models):
    ended = [
        token for token in stream(*models, PROMPTS, control=[None, EqualTo(5)], n=4) if token.finish_reason == "stop"
    ]
    assert len(ended) == 8
    assert all(token.remaining == 0 for token in ended)


def test_the_trace_of_an_unguided_row_claims_no_choice(models):
    completions = generate(*models, PROMPTS, control=[None, Tilt(1.0)], top_p=[1.0, 0.9], max_tokens=4, trace=True)
    assert [step.candidates for step in completions[0].trace] == [[]] * len(completions[0].trace)
    assert any(step.candidates for step in completions[1].trace)


def test_a_controlled_request_needs_a_length_value_model(models, tiny_text):
    generator = LocalGenerator(models[0], tiny_text, "shape")
    requests = [
        PromptRequest(Prompt(str(i), [{"role": "user", "content": "Write."}]), (0,), c)
        for i, c in enumerate([None, Tilt(1)])
    ]
    with pytest.raises(GenerationError, match="needs lenvm"):
        list(generator.sample(requests, SamplingParams(max_tokens=4)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"control": EqualTo(12), "max_tokens": 8}, "max_tokens=8 contradict each other"),
        ({"control": Gated(AtLeast(99)), "max_tokens": 98}, "contradict each other"),
        ({"control": "short"}, "control 'short' of prompt 0 is none"),
        ({"control": [Tilt(1.0)]}, "control has 1 entries for 4 prompts"),
        ({"n": 0, "top_p": 0.0, "temperature": -1.0}, r"n must be at least 1.*temperature must.*top_p must"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"control": EqualTo(10**6)}, r"no prompt can be answered: control EqualTo.*pass the context window"),
        ({"stop": "x"}, "stop needs tokenizer"),
    ],
)
def test_arguments_are_checked_before_anything_runs(text, text_inputs, changes, words):
    with pytest.raises(GenerationError, match=words):
        generate(*text, text_inputs, **changes)


def test_controls_need_a_model_of_the_same_vocabulary(text, text_inputs):
    generator, lenvm = text
    with pytest.raises(GenerationError, match="control needs lenvm"):
        generate(generator, None, text_inputs, control=EqualTo(5))
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=9000, hidden_size=64, num_hidden_layers=1))
    with pytest.raises(GenerationError, match="different vocabularies"):
        generate(other, lenvm, text_inputs, control=EqualTo(5))


def test_pictures_for_a_model_that_reads_text(text, vision_inputs):
    with pytest.raises(GenerationError, match="inputs has images, but generator"):
        generate(*text, vision_inputs[0], control=EqualTo(5))


def test_a_bad_prompt_among_pictures_fails_alone(vision, vision_inputs):
    together, _ = vision_inputs
    expected = generate(*vision, together, control=EqualTo(4), max_tokens=4, seed=[1, 2, 3])
    for change, words in ((0, "the prompt is empty"), (9999, "the models know no token 9999")):
        rows = {name: torch.cat([value, value[:1]]) for name, value in together.items() if value.ndim == 2}
        rows["pixel_values"], rows["image_grid_thw"] = together["pixel_values"], together["image_grid_thw"]
        rows["input_ids"][3] = change  # the picture's tokens are gone too
        rows["mm_token_type_ids"][3] = 0
        rows["attention_mask"][3] = int(change > 0)
        completions = generate(*vision, rows, control=EqualTo(4), max_tokens=4, seed=[1, 2, 3, 4])
        assert words in completions[3].error
        assert [c.token_ids for c in completions[:3]] == [c.token_ids for c in expected]


def test_pictures_that_do_not_fit_are_named(vision, vision_inputs):
    together, _ = vision_inputs
    whole = dict(together)
    for pixels in (whole["pixel_values"][:-4], whole["pixel_values"][:, :100]):
        with pytest.raises(GenerationError, match="inputs: the models cannot take these images"):
            generate(*vision, {**whole, "pixel_values": pixels}, control=EqualTo(4))
    without = {name: whole[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(GenerationError, match="inputs: the models cannot take these images"):
        generate(*vision, without, control=EqualTo(4))
    with pytest.raises(GenerationError, match="an image or video token of the model stands where there is no image"):
        generate(*vision, {name: whole[name] for name in ("input_ids", "attention_mask")}, control=EqualTo(4))


def test_a_bad_prompt_fails_alone(text, text_inputs):
    prompts = prompts_of(text_inputs)
    window = text[0].config.max_position_embeddings
    bad = [prompts[0], [], random_ids(window - 5), prompts[2]]
    completions = generate(*text, bad, **settings())
    assert [completion.finish_reason == "error" for completion in completions] == [False, True, True, False]
    assert completions[1].error == "inputs: the prompt is empty"
    assert "pass the context window" in completions[2].error
    for row in (0, 3):
        alone = generate(*text, [bad[row]], control=EqualTo(12), max_tokens=16, seed=5 + row)
        assert completions[row].token_ids == alone[0].token_ids
