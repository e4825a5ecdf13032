"""Backbones: headless transformers models, text or vision-language, loaded strictly and saved as they are published.

Nothing is guessed: weights that are missing are an error, where transformers would fill them at random. Only
safetensors are read, and remote code runs only where the caller asks for it.
"""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..errors import CheckpointError, nearest
from ..utils.reading import first_line, in_a_sentence, read_json_object
from . import embedded
from .backbone_config import QuantiseKind
from .hub_files import (
    Source,
    asks_for_trust,
    find_file,
    must_be_trusted,
    quiet_transformers,
    read_tensors,
    resolve,
    some,
)

# Entries of a config that count something of which transformers makes a list, and what no model has more of.
_LAYERS, _LABELS = 10_000, 100_000
_MOST = {"num_hidden_layers": _LAYERS, "num_layers": _LAYERS, "n_layer": _LAYERS, "n_layers": _LAYERS, "depth": _LAYERS,
         "num_labels": _LABELS}  # fmt: skip
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")  # entries of a config with one value a layer


def hidden_size(config: PreTrainedConfig) -> int:
    """Width of the last hidden state of the language model, nested configs included.

    Raises:
        CheckpointError: the config does not say.
    """
    width = getattr(config.get_text_config(), "hidden_size", None)
    if type(width) is not int or width < 1:
        raise CheckpointError(f"the config of a {config.model_type} must say its hidden_size, found {width!r}")
    return width


def takes_argument(module: torch.nn.Module, name: str) -> bool:
    """Whether a module's forward names an argument."""
    return name in inspect.signature(module.forward).parameters


def vision_modules(backbone: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Names and modules of vision tower and projector: what a backbone holds beside its language model.

    Nothing for text backbones.
    """
    language = backbone.get_decoder()  # type: ignore[operator]
    if language is backbone:
        return
    for name, child in backbone.named_children():
        if not any(part is language for part in child.modules()):
            yield name, child


def token_types(config: PreTrainedConfig, input_ids: Tensor) -> Tensor:
    """Modality of each token: 0 text, 1 image, 2 video. Same shape, int64."""
    types = torch.zeros_like(input_ids)
    for modality, name in ((1, "image_token_id"), (2, "video_token_id")):
        token = getattr(config, name, None)
        if token is not None:
            types[input_ids == token] = modality
    return types


def cache_argument(module: torch.nn.Module) -> str:
    """What a model calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if takes_argument(module, "cache") else "past_key_values"


def load_config(
    source: Source, overrides: dict[str, Any] | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The backbone's config, with some entries changed.

    Args:
        source: hub id, directory or embedded name.
        overrides: entries to change, nested where the config is.
        trust_remote_code: run code that comes with it. transformers would ask at the terminal where nothing is said.

    Raises:
        CheckpointError: no such model here or on the hub, one whose code is not trusted, a config that is damaged or
            counts more layers than any model has, or an override that it does not have.
    """
    _require_small(source)
    try:
        config = AutoConfig.from_pretrained(resolve(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # entries of a wrong type may end in anything
        if not trust_remote_code and asks_for_trust(error, source, ("config.json",)):
            raise must_be_trusted(source, "modelling code") from error
        raise CheckpointError(
            f"no model could be read from {str(source)!r}: {first_line(error)} Give a Hugging Face id (needs "
            f"the hub), a directory with a config.json, or an embedded name ({', '.join(embedded.generators())})."
        ) from error
    if not overrides:
        return config
    # Built anew from its entries: a config derives some of them from others when it is made, not when it is changed.
    entries = _merge(config.to_dict(), overrides, str(source))
    _require_small_counts(entries, f"overrides {overrides}")
    with in_a_sentence(f"overrides {overrides} do not make a valid config of {source}"):
        return type(config).from_dict(entries)


def _require_small(source: Source) -> None:
    """Refuse a config that alone would fill the memory, before transformers reads it.

    Raises:
        CheckpointError: see above. Anything else that is wrong is left to transformers to find.
    """
    try:
        file = find_file(source, "config.json")
        entries = read_json_object(file) if file is not None else {}
    except CheckpointError:
        return
    _require_small_counts(entries, str(file))


def _require_small_counts(entries: dict[str, Any], where: str) -> None:
    """Refuse numbers of layers or labels that no model has, in nested entries too."""
    level = [entries]
    while level:
        for name, most in _MOST.items():
            for count in (part.get(name) for part in level):
                if isinstance(count, int) and count > most:
                    raise CheckpointError(f"{where}: {name} is {count:,}; it may be {most:,} at most.")
        level = [inner for part in level for inner in part.values() if isinstance(inner, dict)]


def _merge(entries: dict[str, Any], overrides: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(entries)
    if "num_hidden_layers" in overrides:
        merged.pop("layer_types", None)  # one entry a layer; derived again where it was
    for key, value in overrides.items():
        if key not in entries:
            raise CheckpointError(f"the config of {where} has no entry {key!r}{nearest(key, entries)}")
        nested = isinstance(entries[key], dict) and isinstance(value, dict)
        merged[key] = _merge(entries[key], value, f"{where}.{key}") if nested else value
    return merged


def cut_layers(config: PreTrainedConfig, count: int, source: Source) -> None:
    """Makes a config ask for only the first layers of its language model."""
    text = config.get_text_config()
    there = getattr(text, "num_hidden_layers", None)
    if type(there) is not int:
        raise CheckpointError(f"the config of {str(source)!r} must say its num_hidden_layers, found {there!r}")
    if not 1 <= count <= there:
        raise CheckpointError(f"keep_layers must lie between 1 and {there}, the layers of {str(source)!r}; got {count}")
    lists = {name: vars(text)[name][:count] for name in _PER_LAYER if vars(text).get(name)}
    text.num_hidden_layers = count
    for name, kinds in lists.items():
        setattr(text, name, kinds)
    if text.num_hidden_layers != count:
        raise CheckpointError(
            f"{str(source)!r} ({config.model_type}) counts its layers in another way, so they cannot be cut: leave "
            "keep_layers out"
        )


def load_backbone(
    source: Source,
    *,
    pretrained: bool = True,
    overrides: dict[str, Any] | None = None,
    keep_layers: int | None = None,
    dtype: torch.dtype | str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantise: QuantiseKind | None = None,
) -> PreTrainedModel:
    """A headless transformers model.

    Args:
        source: hub id, directory or embedded name.
        pretrained: load the weights; False gives random ones of the same shape. Within `torch.device("meta")`
            nothing is read but the shapes.
        overrides: entries of the config to change, nested where the config is.
        keep_layers: load only so many layers of the language model, the first ones, with the norm after the last;
            None loads all. A vision tower stays whole.
        dtype: of the weights, or `auto` for the checkpoint's own.
        attn_implementation: `sdpa`, `flash_attention_2`, …; transformers' choice where None.
        trust_remote_code: run modelling code that comes with the checkpoint.
        quantise: `nf4` keeps the linear layers of the language model in four bits, scales quantised once more, and
            computes in `dtype`; vision tower, projector and embeddings stay as they are.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: no such model, an unknown override, overrides of pretrained weights, missing weights, layers
            that are not there to be kept.
    """
    if problem := _contradiction(source, pretrained, overrides, keep_layers, quantise):
        raise CheckpointError(problem)
    config = load_config(source, overrides, trust_remote_code=trust_remote_code)
    if keep_layers is not None:
        cut_layers(config, keep_layers, source)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if quantise is not None:
        options["quantization_config"] = _in_four_bits(config, quantise, dtype, options)
    if not pretrained or torch.get_default_device().type == "meta":
        return _from_config(source, config, options).eval()
    model = _from_weights(source, config, options, cut=keep_layers is not None)
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such a CPU, bitsandbytes' first forward in eval mode packs the weights anew, for good: it computes in
            # bfloat16 from then on, and no gradient passes it any more.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _contradiction(
    source: Source,
    pretrained: bool,
    overrides: dict[str, Any] | None,
    keep_layers: int | None,
    quantise: QuantiseKind | None,
) -> str | None:
    """Which of the settings of `load_backbone` exclude each other, in words; None where they agree."""
    if pretrained and overrides:
        return (
            f"overrides ({', '.join(overrides)}) change the shape that the weights of {str(source)!r} have; "
            "set pretrained: false to start from random weights, or leave the overrides out."
        )
    if quantise is not None and not pretrained:
        return f"quantise: {quantise} is of pretrained weights, but pretrained is false: leave one out"
    if keep_layers is not None and not pretrained:
        return (
            f"keep_layers: {keep_layers} says which pretrained weights to load, but pretrained is false: set the "
            "number of layers in overrides"
        )
    return None


def _from_config(source: Source, config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """A model of this shape with random weights; without any on the meta device."""
    dtype = options["dtype"]
    with in_a_sentence(f"a model like {str(source)!r} cannot be built"):
        if dtype == "auto":
            dtype = torch.float32
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        return AutoModel.from_config(config, **{**options, "dtype": dtype})


def _from_weights(source: Source, config: PreTrainedConfig, options: dict[str, Any], cut: bool) -> PreTrainedModel:
    """A model with the weights of `source`, every one of them; `cut` says that layers are left out on purpose."""
    try:
        with quiet_transformers():
            model, info = AutoModel.from_pretrained(
                resolve(source),
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed below
                **options,
            )
    except ImportError as error:  # attention kernels, say
        raise CheckpointError(f"{str(source)!r} cannot be loaded as it was asked for: {first_line(error)}") from error
    except Exception as error:  # of whatever a config or file of a wrong form made transformers do
        raise CheckpointError(
            f"no weights could be read from {str(source)!r} (looked for safetensors files): {first_line(error)}"
        ) from error
    wrong = [f"{key} is {tuple(have)}, expected {tuple(want)}" for key, have, want in sorted(info["mismatched_keys"])]
    if wrong:
        cause = "Weights and config come from different models: save or download both again."
        if cut:  # such as embeddings for all layers in one tensor
            cause = "Where a weight belongs to all layers, they cannot be cut: leave keep_layers out."
        raise CheckpointError(
            f"{len(wrong)} weights in {str(source)!r} do not have the shape its config.json asks for: {some(wrong)}. "
            + cause
        )
    _fill_missing(model, set(info["missing_keys"]), source)
    return model


def _in_four_bits(
    config: PreTrainedConfig, kind: QuantiseKind, dtype: torch.dtype | str, options: dict[str, Any]
) -> BitsAndBytesConfig:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    options["dtype"] = computed = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if computed not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"quantise: {kind} computes in float32, bfloat16 or float16; dtype is {dtype}")
    with torch.device("meta"), in_a_sentence("the config makes no model that could be loaded in four bits"):
        shape = AutoModel.from_config(config, trust_remote_code=options["trust_remote_code"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
        llm_int8_skip_modules=[name for name, _ in vision_modules(shape)],
    )


def _fill_missing(model: PreTrainedModel, missing: set[str], source: Source) -> None:
    """Takes the input embedding from a tied `lm_head.weight`; any other missing weight is an error."""
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding) + ".weight"
    if name in missing and getattr(model.config, "tie_word_embeddings", False):
        head = next((tensor for _, tensor in read_tensors(source, lambda key: key.endswith("lm_head.weight"))), None)
        if head is not None and head.shape == embedding.weight.shape:
            embedding.weight.data.copy_(head)  # type: ignore[operator]
            missing = missing - {name}
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights of {type(model).__name__} are not in {str(source)!r}: {some(sorted(missing))}. "
            "The directory is incomplete or of another architecture; transformers would have filled them at random."
        )


def save_backbone(folder: Path, backbone: PreTrainedModel) -> None:
    """Write a backbone as an ordinary Hugging Face directory."""
    published = _as_published(backbone)
    # The vocabulary head of an untied model stays on meta: it was never loaded, so there is none to write.
    weights = {key: tensor for key, tensor in published.state_dict().items() if not tensor.is_meta}
    with quiet_transformers():
        published.save_pretrained(folder, state_dict=weights)


def _as_published(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone inside the class it is published as, whose key names and `architectures` other tools expect.

    A backbone that transformers has no such class for is returned as it is.
    """
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        kind: Any = mapping.get(type(backbone.config), None)
        if kind is None:
            continue
        with torch.device("meta"):
            full = kind(copy.deepcopy(backbone.config))
        if type(full.base_model) is type(backbone):
            setattr(full, full.base_model_prefix, backbone)
            full.tie_weights()
            return full
    return backbone
