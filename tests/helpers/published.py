"""Model directories as others publish them, and harm to them."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from value_models import trained

from lenvm_lightning.models.value_model import LengthValueModel

INDEX = "model.safetensors.index.json"


def publish(folder: Path, layout: str, family: str = "tiny-text") -> LengthValueModel:
    """Write a directory as others publish it; what it should give."""
    model = trained(family)
    kind = AutoModelForCausalLM if family == "tiny-text" else AutoModelForImageTextToText
    full = kind.from_config(model.backbone.config)
    full.model.load_state_dict(model.backbone.state_dict())
    full.save_pretrained(folder, **({"max_shard_size": "2MB"} if "index" in layout else {}))
    head = model.v_head.state_dict()
    named = {f"v_head.{key}": tensor for key, tensor in head.items()}
    if "index" in layout:
        index = json.loads((folder / INDEX).read_text())
        assert len(set(index["weight_map"].values())) > 1
        index["weight_map"] |= dict.fromkeys(head, "model-head.safetensors")
        (folder / INDEX).write_text(json.dumps(index))
        save_file(head, folder / "model-head.safetensors", metadata={"format": "pt"})
        return model
    weights = load_file(folder / "model.safetensors")
    if layout == "bare suffixes":
        weights |= head
    elif layout == "prefixed in the shards":
        weights |= {f"model.{key}": tensor for key, tensor in named.items()}
    else:
        save_file(named, folder / "value_head.safetensors")
    if "only lm_head" in layout:
        assert "lm_head.weight" not in weights
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def write_config(folder: Path, text: str) -> None:
    (folder / "lenvm_config.json").write_text(text)
