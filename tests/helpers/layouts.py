"""Rows, models and gradients that the tests of batch layouts share."""

from functools import partial

import torch
from gradients import exact_norm
from PIL import Image
from transformers import AutoModel

from datamodules.collate import Collator
from lenvm_lightning import LengthValueModel, LenVMConfig
from lenvm_lightning.training.batch_layouts import compute
from lenvm_lightning.training.layout_plan import make_plan

VALUES, GRADIENTS = 1e-12, 1e-9  # float64; a vision tower computes parts in float32, the same ones in every layout
# Completions of three prompts, in no order, one of them alone.
COMPLETIONS = [(0, 7), (1, 12), (0, 11), (2, 6), (1, 3), (0, 9), (1, 1)]


def exact(model: LengthValueModel) -> LengthValueModel:
    """The model in float64, without the norms that transformers computes in float32 whatever they get."""
    for module in model.modules():
        if type(module).__name__ in ("Qwen2RMSNorm", "Qwen2_5_VLRMSNorm", "LlamaRMSNorm", "MistralRMSNorm"):
            module.forward = partial(exact_norm, module)
    return model


def random_rows(vocabulary: int = 100, prompts=(9, 14, 5), completions=COMPLETIONS) -> list[dict]:
    """Rows of text."""
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, vocabulary, (length,), generator=random).tolist() for length in prompts]
    rows = []
    for number, (prompt, length) in enumerate(completions):
        own = torch.randint(5, vocabulary, (length,), generator=random).tolist()
        rows.append({
            "input_ids": ids[prompt] + own, "prompt_length": len(ids[prompt]), "length": length,
            "censored": number == 2, "images": [], "paths": (), "prompt_index": prompt, "row": number,
        })  # fmt: skip
    return rows


def image_rows(processor) -> list[dict]:
    """Rows about images of three sizes, one prompt with two of them, before and after text of different length."""
    random = torch.Generator().manual_seed(0)

    def image(width, height):
        return Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=random).byte().numpy())

    images_of_prompts = [[image(56, 84)], [image(112, 56), image(84, 84)], [image(140, 56)]]
    texts = ["How many?", "Which of these is larger, and why?", "What?"]
    rows = random_rows()
    for row in rows:
        images, prompt = images_of_prompts[row["prompt_index"]], row["prompt_index"]
        text = "<|vision_start|><|image_pad|><|vision_end|>" * len(images) + texts[prompt]
        ids = processor(text=[text], images=images)["input_ids"][0]
        own = row["input_ids"][row["prompt_length"] :]
        row.update(input_ids=[*ids, *own], prompt_length=len(ids), images=images, paths=(f"{prompt}.png",))
    return rows


def layouts_of(rows: list[dict], image_processor=None) -> dict:
    """The same rows plain, shared and packed."""
    return {layout: Collator(0, image_processor, layout)(rows) for layout in ("rows", "shared", "packed")}


def run(model, logits, batch):
    """Logits of the real tokens, and the gradient of a sum that weighs every one of them differently."""
    there = batch["attention_mask"].bool()
    model.zero_grad()
    values = logits()
    weights = torch.linspace(0.1, 1.0, values.numel(), dtype=values.dtype).view_as(values)
    torch.where(there, values * weights, 0.0).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return values.detach()[there], gradient


def planned(model, batch, way):
    plan = make_plan(batch["layout"], [way], ordered=bool(batch["vision"]))
    return compute(model, batch, plan)[..., 0]


SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}


def small(config, attention):
    torch.manual_seed(0)
    # transformers' eager attention gives NaN where a token sees nothing, in float64 alone: there it is float32.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model = LengthValueModel(AutoModel.from_config(config, attn_implementation=attention).to(dtype), LenVMConfig(0.9))
    model.v_head.reset(0.0)
    return exact(model).eval()
