"""Writes the folders of the tiny models: `python -m lenvm_lightning.tinyworld.build`.

The JSON is written out here by hand, not by `save_pretrained`, so that the shipped files do not change with the
version of transformers that happened to write them.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from lenvm_lightning.tinyworld import NAMES, path
from lenvm_lightning.tinyworld.tokenizer import (
    CHAT_TEMPLATE,
    EOS_TOKEN,
    MAX_LENGTH,
    PAD_TOKEN,
    VOCABULARY_SIZE,
    tokenizer_config,
    train,
)

# Pixels of an image after resizing: 4 to 16 image tokens of 28 x 28 pixels.
MIN_PIXELS, MAX_PIXELS = 56 * 56, 112 * 112
PATCH, MERGE, FRAMES = 14, 2, 2  # pixels a patch side, patches a token side, frames a patch


def text_shape(token_id: dict[str, int]) -> dict:
    """Return the sizes shared by both language models, about a million parameters each."""
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "use_cache": True,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": token_id[EOS_TOKEN],
        "pad_token_id": token_id[PAD_TOKEN],
    }


def text_config(token_id: dict[str, int]) -> dict:
    """Return config.json of tiny-text, a Qwen2 language model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "float32",
        **text_shape(token_id),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def vl_config(token_id: dict[str, int]) -> dict:
    """Return config.json of tiny-vl, a Qwen2.5-VL model."""
    text = text_shape(token_id)
    # The sections are the halves of head_dim 32 given to time, height and width.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {
        "model_type": "qwen2_5_vl_vision",
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "hidden_act": "silu",
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "out_hidden_size": text["hidden_size"],
        "initializer_range": 0.02,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": "float32",
        "image_token_id": token_id["<|image_pad|>"],
        "video_token_id": token_id["<|video_pad|>"],
        "vision_start_token_id": token_id["<|vision_start|>"],
        "vision_end_token_id": token_id["<|vision_end|>"],
        "bos_token_id": None,
        "eos_token_id": text["eos_token_id"],
        "pad_token_id": text["pad_token_id"],
        "tie_word_embeddings": True,
        "text_config": {"model_type": "qwen2_5_vl_text", **text, "rope_parameters": rope},
        "vision_config": vision,
    }


def processor_config() -> dict:
    """Return preprocessor_config.json of tiny-vl, read for images and for videos."""
    return {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def files(name: str, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the files of the folder `name`: file name -> text."""
    token_id = tokenizer.get_vocab(with_added_tokens=True)
    head = {"tokenizer_class": "Qwen2Tokenizer"}
    if name == "tiny-vl":
        head["processor_class"] = "Qwen2_5_VLProcessor"
    folder = {
        "config.json": _json(text_config(token_id) if name == "tiny-text" else vl_config(token_id)),
        "tokenizer.json": tokenizer.to_str() + "\n",
        "tokenizer_config.json": _json(head | tokenizer_config()),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    if name == "tiny-vl":
        folder["preprocessor_config.json"] = _json(processor_config())
    return folder


def build(target: Path | None = None) -> None:
    """Write the folders of all tiny models under `target`, by default where `path` finds them."""
    tokenizer = train()
    for name in NAMES:
        folder = path(name) if target is None else target / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files(name, tokenizer).items():
            (folder / file).write_text(text, encoding="utf-8")


def _json(value: dict) -> str:
    """Format a configuration the way Hugging Face does."""
    return json.dumps(value, indent=2) + "\n"


if __name__ == "__main__":
    build()
