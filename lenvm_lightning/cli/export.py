"""`lenvm export`: a model directory out of a run, a checkpoint or an adapter."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from ..models.value_model import LengthValueModel

EXAMPLES = """examples:
  lenvm export runs/vlm_qlora exported                              whole weights, the adapter added to them
  lenvm export runs/vlm_qlora exported --dtype bfloat16             of another type
  lenvm export runs/qwen2.5-32b-fsdp exported                       a run that was stopped: its last checkpoint
  lenvm export runs/vlm_qlora/checkpoints/step-000000400.ckpt adapter --adapter
  lenvm export runs/text_lenvm exported --push me/my-lenvm          and publish it, with its model card

What was written is loaded again, and its values compared with those of the source.
"""
_COMPARED_TOKENS = 64  # tokens on which source and target are compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lenvm export`."""
    parser.add_argument("source", metavar="SOURCE", help="a run, one of its checkpoints, a model directory or a hub id")
    parser.add_argument("target", type=Path, metavar="TARGET", help="directory to write; must not be there yet")
    parser.add_argument("--adapter", action="store_true", help="keep adapter and head by themselves, do not merge")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the whole weights (default: that of the source; float32 where its base is in four bits)",
    )
    parser.add_argument("--license", metavar="ID", help="for the model card (default: that of its base, where known)")
    parser.add_argument("--push", metavar="REPO", help="publish it on the Hugging Face hub, such as me/my-lenvm")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that is made now is private")
    parser.add_argument("--gamma", type=float, help="of a length value model whose folder does not say")
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code that comes with it")


def execute(arguments: argparse.Namespace) -> int:
    """Write the directory and say what is in it.

    Raises:
        CheckpointError: the source cannot be used, the target is there already, or the hub refuses.
        StoreError: the disk is full.
    """
    import torch

    from ..models import adapters
    from ..models.hub import push_folder
    from ..models.model_card import CARD_FILE
    from ..pipeline.quiet import quieten
    from ..utils.locked_folder import full_disk_in_a_sentence

    quieten()
    if arguments.target.exists() and (not arguments.target.is_dir() or any(arguments.target.iterdir())):
        raise CheckpointError(f"{arguments.target} is there already: name another place")
    model, processor = _open(arguments)
    adapted = adapters.is_adapted(model.backbone)
    if arguments.adapter and not adapted:
        raise CheckpointError(f"--adapter: {arguments.source} was trained whole, it has no adapter")
    if arguments.adapter and arguments.dtype:
        raise CheckpointError("--dtype is of whole weights; an adapter stays in the type it was trained in")
    if arguments.private and not arguments.push:
        raise CheckpointError("--private is of a repository on the hub: say --push REPO, too")
    if arguments.adapter and arguments.push:
        adapters.refuse_local_base(model.backbone, str(model.config.backbone))
    card = model.card(arguments.license)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    before = _values_of(model)
    with full_disk_in_a_sentence(f"Make room, delete {arguments.target}, then type the same command again."):
        if arguments.adapter:
            model.save_pretrained(arguments.target, processor)
        elif adapted:
            in_four_bits = model.config.base.get("quantise") is not None
            model.save_merged(arguments.target, processor, dtype or (torch.float32 if in_four_bits else None))
        else:
            (model.to(dtype) if dtype else model).save_pretrained(arguments.target, processor)
        card.save(arguments.target / CARD_FILE)
    _report(arguments, before)
    if arguments.push:
        print(push_folder(arguments.target, arguments.push, private=arguments.private or None))
    return 0


def _open(arguments: argparse.Namespace) -> tuple["LengthValueModel", Any]:
    """The model, and its processor or None."""
    from ..models.processors import load_processor
    from ..models.value_model import LengthValueModel
    from ..pipeline.run_folder import RunFolder
    from ..training.callbacks import latest_checkpoint
    from ..training.load_checkpoint import model_of_checkpoint

    source: str | Path = arguments.source
    trust = {"trust_remote_code": arguments.trust_remote_code}
    run = RunFolder(Path(source))
    if run.settings() is not None:
        found = run.model if run.complete else latest_checkpoint(run.checkpoints)
        if found is None:
            raise CheckpointError(f"{source} has neither been finished nor saved a checkpoint yet")
        source = found
    if Path(source).suffix == ".ckpt":
        model = model_of_checkpoint(Path(source), **trust)
        return model, load_processor(str(model.config.backbone), **trust)
    model = LengthValueModel.from_pretrained(source, gamma=arguments.gamma, **trust)
    try:
        return model, load_processor(source, **trust)
    except CheckpointError:  # a published directory may be weights alone
        return model, None


def _values_of(model: "LengthValueModel") -> "torch.Tensor":
    """Values of a few tokens that mean nothing, to compare source and target. Shape (1, T)."""
    import torch

    vocabulary: int = model.backbone.config.get_text_config().vocab_size
    ids = torch.arange(_COMPARED_TOKENS, device=model.backbone.device)[None] * 7919 % vocabulary
    ids[ids == getattr(model.backbone.config, "image_token_id", -1)] = 0  # there is no image
    with torch.inference_mode():
        return model.value(model(ids))


def _report(arguments: argparse.Namespace, before: "torch.Tensor") -> None:
    from ..models.value_model import LengthValueModel

    target: Path = arguments.target
    written = LengthValueModel.from_pretrained(target, trust_remote_code=arguments.trust_remote_code).to(before.device)
    apart = float((_values_of(written) - before).abs().max())
    size = sum(file.stat().st_size for file in target.iterdir())
    kind = "adapter and head" if written.config.base else f"whole weights, {written.backbone.dtype}"
    print(
        f"{target}: {kind}, {size / 1e6:,.1f} MB · gamma {written.gamma} · on {_COMPARED_TOKENS} tokens, "
        f"values differ from the source's by at most {apart:.1e}"
    )
