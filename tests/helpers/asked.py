"""Prompts for the local generator, and what it answers."""

from random import Random

import torch
from PIL import Image

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest

WORDS = ("apples", "books", "seven", "three", "gives", "left", "how", "many", "shop", "then", "each", "bag", "takes")


def text_prompts(count, seed=0):
    rng = Random(seed)
    lengths = [rng.choice((1, 5, 20, 60, 61, 62, 63, 64, 65, 120, 190)) for _ in range(count)]
    return [
        Prompt(f"p{number}", [{"role": "user", "content": " ".join(rng.choices(WORDS, k=length))}])
        for number, length in enumerate(lengths)
    ]


def picture(width, height, seed):
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def vision_prompts():
    """Pictures of different sizes, two in one prompt, and a prompt without."""
    ask = [{"role": "user", "content": "<image>How many?"}]
    return [
        Prompt("wide", ask, (picture(112, 56, 0),)),
        Prompt("high", ask, (picture(56, 140, 1),)),
        Prompt("two", [{"role": "user", "content": "<image>or <image>?"}], (picture(84, 84, 2), picture(60, 90, 3))),
        Prompt("none", [{"role": "user", "content": "How many?"}]),
        Prompt("square", ask, (picture(84, 84, 4),)),
    ]


def requests(prompts, n=1):
    return [PromptRequest(prompt, tuple(range(n))) for prompt in prompts]


def results(generator, asked, sampling):
    found = {(answer.prompt_id, answer.number): answer.result for answer in generator.sample(asked, sampling)}
    wanted = [(request.prompt.prompt_id, number) for request in asked for number in request.numbers]
    assert sorted(found) == sorted(wanted)
    return found


def tokens(found):
    return {key: (completion.token_ids, completion.logprob) for key, completion in found.items()}


def logprob_of(generator, prompt, completion):
    """Log-probability of a completion by one forward of the whole sequence, without any cache."""
    ids, inputs = generator.encode(prompt, SamplingParams(max_tokens=1))
    all_ids = torch.tensor([ids + completion.token_ids])
    inputs = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image"))}
    if inputs:
        inputs["mm_token_type_ids"] = (all_ids == generator.model.config.image_token_id).long()
    with torch.inference_mode():
        logits = generator.model(input_ids=all_ids, use_cache=False, **inputs).logits[0, len(ids) - 1 : -1]
    chosen = logits.double().log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])
    return float(chosen.sum())
