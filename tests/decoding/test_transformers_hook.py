"""Guided decoding through transformers' own `generate`."""

import pytest
import torch
from pairs import (
    END,
)
from tiny_generators import build
from transformers import StoppingCriteriaList, StopStringCriteria

from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.decoding.transformers_hook import guided
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import EqualTo, Tilt


def test_the_hook_without_a_control_is_generate_bit_for_bit(vision, vision_inputs):
    """Also after the models were in guided decoding, which gives them another attention."""
    inputs = vision_inputs[0]
    options = {"do_sample": True, "top_k": 15, "max_new_tokens": 6, "pad_token_id": 0, "num_return_sequences": 2}
    fresh = build("tiny-vl", torch.float64)
    torch.manual_seed(3)
    own = fresh.generate(**inputs, **options)
    generator, lenvm = vision
    generate(generator, lenvm, inputs, control=EqualTo(2), max_tokens=2)
    torch.manual_seed(3)
    assert torch.equal(generator.generate(**inputs, **options, custom_generate=guided(lenvm, None)), own)


@pytest.mark.parametrize("which", ["text", "vision"])
def test_the_hook_guides(which, request, text_inputs, vision_inputs):
    generator, lenvm = request.getfixturevalue(which)
    inputs = text_inputs if which == "text" else vision_inputs[0]
    options = {"do_sample": True, "top_k": 15, "top_p": 0.999, "max_new_tokens": 6, "pad_token_id": 0}
    options["num_return_sequences"] = 2
    torch.manual_seed(3)
    sequences = generator.generate(**inputs, **options, custom_generate=guided(lenvm, EqualTo(5)))
    torch.manual_seed(3)
    seeds = torch.randint(2**31, (len(inputs["input_ids"]),)).tolist()
    expected = generate(generator, lenvm, inputs, control=EqualTo(5), max_tokens=6, seed=seeds, n=2)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(sequences[::2, :width], inputs["input_ids"])
    for row, completion in enumerate(expected):
        assert sequences[row, width:].tolist()[: len(completion.token_ids)] == completion.token_ids


def test_the_hook_knows_stopping_criteria(text, tiny_text):
    generator, lenvm = text
    ids = torch.tensor([tiny_text("Once", add_special_tokens=False)["input_ids"]] * 2)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    free = generator.generate(ids, **options, custom_generate=guided(lenvm, Tilt(1.0)))
    word = tiny_text.decode(free[0, ids.shape[1] : ids.shape[1] + 6])[-4:]
    options["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tiny_text, [word])])
    stopped = generator.generate(ids, **options, custom_generate=guided(lenvm, [Tilt(1.0), Tilt(-9.0)]))
    assert word in tiny_text.decode(stopped[0])
    assert stopped.shape[0] == 2


def test_the_hook_ends_with_the_tokens_that_generate_was_given(text):
    generator, lenvm = text
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    own = generator.generate(ids, **options, custom_generate=guided(lenvm, Tilt(1.0)))
    assert own.tolist() == [[5, 6, 7, END], [8, 9, 10, END]]
    others = generator.generate(ids, **options, eos_token_id=[1, 2], custom_generate=guided(lenvm, Tilt(1.0)))
    assert others.shape == (2, 9)


def test_the_hook_tells_what_failed(text):
    generator, lenvm = text
    controls = [Tilt(1.0), lambda probs, remaining, generated, gamma: 0 * probs]
    with pytest.warns(UserWarning, match="sequence 1: .*leave no token to sample"):
        generator.generate(
            torch.tensor([[5, 6], [8, 9]]), max_new_tokens=3, pad_token_id=0, custom_generate=guided(lenvm, controls)
        )


def test_the_hook_refuses_what_it_cannot_do(text, text_inputs):
    generator, lenvm = text
    with pytest.raises(GenerationError, match=r"RepetitionPenaltyLogitsProcessor.*output_scores"):
        generator.generate(
            **text_inputs,
            max_new_tokens=2,
            repetition_penalty=1.3,
            output_scores=True,
            return_dict_in_generate=True,
            custom_generate=guided(lenvm, EqualTo(5)),
        )
