"""Small pairs of generator and length value model, and inputs for both."""

import pytest
import torch
from PIL import Image
from tiny_generators import build
from transformers import AutoConfig

from lenvm_lightning import tinyworld
from lenvm_lightning.guidance import EqualTo
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel

GAMMA = 0.99
PROMPTS = [[5, 6, 7], [8, 9]]
END = AutoConfig.from_pretrained(tinyworld.path("tiny-text")).eos_token_id


def value_model(name, dtype=torch.float64, layers=2):
    """A smaller model than the generator, with random weights and predictions far apart."""
    vision = {"vision_config": {"depth": 1}} if name == "tiny-vl" else {}
    text = {"num_hidden_layers": layers}
    overrides = {"text_config": text, **vision} if name == "tiny-vl" else text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lenvm = LengthValueModel.from_backbone(
            name, LenVMConfig(gamma=GAMMA), pretrained=False, dtype="float64", overrides=overrides, expected_length=60.0
        )
    for weight in lenvm.backbone.parameters():
        if weight.ndim > 1:
            weight.data.mul_(3)
    lenvm.v_head.summary.weight.data.mul_(100)
    return lenvm.to(dtype).eval()


@pytest.fixture(scope="module")
def text():
    return build("tiny-text", torch.float64, eos_bias=6.0), value_model("tiny-text")


@pytest.fixture(scope="module")
def vision():
    return build("tiny-vl", torch.float64), value_model("tiny-vl")


@pytest.fixture(scope="module")
def text_inputs():
    """Prompts of different lengths, padded on the left."""
    prompts = [random_ids(count, count) for count in (3, 70, 21, 1)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def vision_inputs(tiny_vl):
    """Pictures of different sizes, prompts of different lengths, padded on the left; and each of them alone."""
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((84, 84), (140, 84), (56, 112))]
    questions = ["How many?", "How many circles are there, and which of them is the largest?", "Sum?"]
    texts = [
        tiny_vl.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    together = tiny_vl(
        text=texts,
        images=[[picture] for picture in pictures],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    alone = [tiny_vl(text=[t], images=[[p]], return_tensors="pt") for t, p in zip(texts, pictures, strict=True)]
    return together, alone


def random_ids(count, seed=0):
    return torch.randint(2000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts_of(inputs):
    return [ids[seen].tolist() for ids, seen in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)]


@torch.no_grad()
def full_remaining(lenvm, ids, pictures=None):
    """Remaining tokens after the last of the ids, without any cache."""
    ids = torch.tensor([ids])
    extra = {name: value for name, value in (pictures or {}).items() if name in ("pixel_values", "image_grid_thw")}
    extra = {
        name: value.to(lenvm.backbone.dtype) if value.is_floating_point() else value for name, value in extra.items()
    }
    return lenvm.remaining(lenvm(ids, torch.ones_like(ids), **extra))[0, -1].item()


def largest_difference(lenvm, prompts, completions, pictures=None, end=END):
    """Of values, between the trace of completions and the recomputation of everything."""
    worst = 0.0
    for completion in completions:
        own = pictures[completion.prompt] if pictures else None
        for place, step in enumerate(completion.trace):
            so_far = prompts[completion.prompt] + completion.token_ids[:place]
            pairs = [(step.remaining, full_remaining(lenvm, so_far, own))]
            for candidate, after in zip(step.candidates[:4], step.remaining_after[:4], strict=True):
                if candidate == end:
                    assert after == 0.0
                else:
                    pairs.append((after, full_remaining(lenvm, [*so_far, candidate], own)))
            worst = max([worst, *(abs(GAMMA**a - GAMMA**b) for a, b in pairs)])
    return worst


def settings(**changes):
    return {"control": EqualTo(12), "max_tokens": 16, "seed": [5, 6, 7, 8], **changes}
