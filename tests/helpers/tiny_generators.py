"""Generators in the tiny shapes with random weights, sharper than fresh ones so that tokens differ in likelihood."""

import shutil

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lenvm_lightning import tinyworld


def build(name, dtype=torch.float32, sharpness=3.0, eos_bias=0.0):
    """A model in the shape of ``tiny-text`` or ``tiny-vl``.

    ``eos_bias`` is added to the logit of EOS, by a bias that the vocabulary head does not have otherwise.
    """
    config = AutoConfig.from_pretrained(tinyworld.path(name), tie_word_embeddings=False)
    config.get_text_config().tie_word_embeddings = False
    auto = AutoModelForImageTextToText if name == "tiny-vl" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(sharpness)
    if eos_bias:
        bias = torch.zeros(config.get_text_config().vocab_size)
        bias[config.get_text_config().eos_token_id] = eos_bias
        model.lm_head.bias = torch.nn.Parameter(bias)
    return model.to(dtype)


def save(model, name, folder):
    """Write it with the tokenizer files of ``name``, as a directory that ``from_pretrained`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in tinyworld.path(name).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    model.save_pretrained(folder)
    return folder
