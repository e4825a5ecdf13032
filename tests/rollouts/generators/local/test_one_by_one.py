"""Families that rows do not fit."""

import warnings

import pytest
import torch
from asked import logprob_of, requests, results, text_prompts
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    MambaConfig,
)

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.rollouts.generators.interface import PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=2048, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2043),  # makes its own biases
        MambaConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=2, eos_token_id=2043),  # has no keys at all
    ],
    ids=["bloom", "mamba"],
)
def test_other_families_sample_prompt_by_prompt(tiny_text, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.mul_(4)
    prompts = text_prompts(3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generator = LocalGenerator(model, tiny_text, "other")
        greedy = results(generator, requests(prompts, 1), SamplingParams(temperature=0, max_tokens=12))
    assert any("does not work with continuous batching" in str(warning.message) for warning in said)
    for prompt in prompts:
        ids, _ = generator.encode(prompt, SamplingParams(max_tokens=12))
        whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert greedy[prompt.prompt_id, 0].token_ids == whole
    drawn = results(generator, requests(prompts, 3), SamplingParams(max_tokens=12))
    assert drawn == results(generator, requests(prompts, 3), SamplingParams(max_tokens=12))
    assert len({tuple(completion.token_ids) for completion in drawn.values()}) == 9
    for prompt in prompts:
        whole = logprob_of(generator, prompt, drawn[prompt.prompt_id, 1])
        assert drawn[prompt.prompt_id, 1].logprob == pytest.approx(whole, abs=1e-3)
    few = [PromptRequest(prompt, (0, 1, 2), limit=lambda: 4) for prompt in prompts]
    for key, completion in results(generator, few, SamplingParams(max_tokens=12)).items():
        assert completion.token_ids == drawn[key].token_ids[:4]
