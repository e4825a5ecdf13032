"""Logits of sampled completions: batched as one by one, and mistakes that stop nobody else."""

import copy
import dataclasses

import pytest
import torch

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.evaluation.prediction import predict_lengths
from lenvm_lightning.inspection.rollout_values import values_of
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.generators.interface import GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.prompting import encode_prompt
from lenvm_lightning.tinyworld.prompt_sets import prompt_set
from lenvm_lightning.utils.images import open_image


@pytest.fixture(scope="module", params=["tiny-text", "tiny-vl"])
def sampled(request):
    """Value model, processor, and two completions of each of a few prompts of unlike lengths."""
    lenvm = LengthValueModel.from_pretrained(f"{request.param}-lenvm")
    prompts = list(prompt_set("tiny-write" if request.param == "tiny-text" else "tiny-vqa", "test", 6))
    if request.param == "tiny-vl":  # and prompts with two images or none, which a vision-language model reads too
        two = [{"role": "user", "content": "<image><image>How many circles?"}]
        prompts[1] = dataclasses.replace(prompts[1], messages=two, images=prompts[1].images + prompts[2].images)
        prompts[4] = Prompt("text", [{"role": "user", "content": "How many circles?"}])
    generator = LocalGenerator.load(request.param)
    requests = [PromptRequest(prompt, (0, 1)) for prompt in prompts]
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    completions = [
        (by_id[answer.prompt_id], answer.result.token_ids)
        for answer in generator.sample(requests, SamplingParams(max_tokens=160))
        if isinstance(answer.result, GeneratedText)
    ]
    assert len(completions) == 12
    return lenvm, load_processor(request.param), completions


@torch.inference_mode()
def alone(lenvm, processor, prompt, ids):
    """One forward of one row, as the processor made it: no padding, no collator."""
    prompt_ids, inputs = encode_prompt(processor, prompt.messages, [open_image(image) for image in prompt.images])
    inputs = {name: x for name, x in inputs.items() if name not in ("attention_mask", "mm_token_type_ids")}
    return lenvm(torch.tensor([prompt_ids + list(ids)]), **inputs)[0, len(prompt_ids) - 1 :]


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_batched_is_one_by_one(sampled, batch_tokens):
    lenvm, processor, completions = sampled
    found = dict(values_of(lenvm, processor, completions, batch_tokens, window=7))
    assert sorted(found) == list(range(len(completions)))
    for number, (prompt, ids) in enumerate(completions):
        assert found[number].shape == (len(ids) + 1,)
        assert found[number].dtype == torch.float32
        # Other batch sizes take other kernels, which round differently.
        torch.testing.assert_close(found[number], alone(lenvm, processor, prompt, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampled", ["tiny-vl"], indirect=True)
def test_the_images_are_those_of_the_prompt(sampled):
    lenvm, processor, completions = sampled
    one = [(prompt, ids) for prompt, ids in completions if len(prompt.images) == 1]
    first, other = one[0], next(pair for pair in one if pair[0] is not one[0][0])
    swapped = (dataclasses.replace(first[0], images=other[0].images), first[1])
    found = dict(values_of(lenvm, processor, [first, swapped]))
    assert (found[0] - found[1]).abs().max() > 0.01


def test_the_prompt_boundary_is_what_predict_says(sampled):
    lenvm, processor, completions = sampled
    found = dict(values_of(lenvm, processor, completions))
    predicted = list(predict_lengths(lenvm, processor, [prompt for prompt, _ in completions], batch=5))
    assert [prompt for prompt, _ in predicted] == [prompt for prompt, _ in completions]
    for number, (_, length) in enumerate(predicted):
        assert length.expected_tokens == pytest.approx(float(lenvm.remaining(found[number])[0]), rel=1e-4)


def test_what_cannot_be_read_stops_nobody_else(sampled, tmp_path):
    lenvm, processor, completions = sampled
    (tmp_path / "no.png").write_text("no image")
    prompt, ids = completions[0]
    asked = [{"role": "user", "content": "<image>What is it?"}]
    sees = hasattr(processor, "image_processor")
    wrong = {
        "the prompt has images, but" if not sees else "cannot be read": (
            Prompt("a", asked, (str(tmp_path / "no.png"),)),
            ids,
        ),
        "1 <image> marks in the prompt but 0 images": (Prompt("b", asked), ids),
        "token id 99999 is not among the": (prompt, [5, 99_999]),
        "token id -1 is not among the": (prompt, [-1]),
        "KeyError": (Prompt("c", [{"role": "user"}]), ids),
    }
    if sees:
        wrong["the completion has an image or video token"] = (prompt, [lenvm.backbone.config.image_token_id])
    found = dict(values_of(lenvm, processor, [completions[0], *wrong.values(), completions[-1]]))
    for number, text in enumerate(wrong, start=1):
        assert text in found[number]
    for number, (prompt, ids) in ((0, completions[0]), (len(wrong) + 1, completions[-1])):
        torch.testing.assert_close(found[number], alone(lenvm, processor, prompt, ids), rtol=1e-5, atol=1e-5)


def test_texts_beyond_the_context_window_have_no_value(sampled):
    lenvm, processor, completions = sampled
    window = lenvm.backbone.config.get_text_config().max_position_embeddings
    prompt = Prompt("long", [{"role": "user", "content": "word " * window}])
    [(_, told), (_, length)] = predict_lengths(lenvm, processor, [prompt, completions[0][0]])
    assert f"more than the context window of {window:,} tokens" in told
    assert length.expected_tokens > 0
    found = dict(values_of(lenvm, processor, [(completions[0][0], [5] * window)]))
    assert "more than the context window" in found[0]


def test_a_broken_head_predicts_nothing(sampled):
    lenvm, processor, completions = sampled
    broken = copy.deepcopy(lenvm)
    broken.v_head.summary.bias.data.fill_(float("nan"))
    [(_, told)] = predict_lengths(broken, processor, [completions[0][0]])
    assert told == "the length value model predicts nan: it is broken"


def test_no_vocabulary_logits_no_gradient():
    lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm")
    widths = set()
    for module in lenvm.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, _args, output: widths.add(output.shape[-1]))
    prompt = prompt_set("tiny-math", "test", 1)[0]
    [(_, logits)] = values_of(lenvm, load_processor("tiny-text"), [(prompt, [5, 6])])
    assert not logits.requires_grad
    assert widths
    assert lenvm.backbone.config.vocab_size not in widths
