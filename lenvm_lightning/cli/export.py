"""`lenvm export`: a model directory out of a run, a checkpoint or an adapter."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from ..models.value_model import LengthValueModel
    from ..rollouts.generators.local import LocalGenerator

EXAMPLES = """examples:
  lenvm export runs/vlm_qlora exported                              whole weights, the adapter added to them
  lenvm export runs/vlm_qlora exported --dtype bfloat16             of another type
  lenvm export runs/qwen2.5-32b-fsdp exported                       a run that was stopped: its last checkpoint
  lenvm export runs/vlm_qlora/checkpoints/step-000000400.ckpt adapter --adapter
  lenvm export runs/text_lenvm exported --push me/my-lenvm          and publish it, with its model card
  lenvm export runs/q/model guided --custom-generate                for generate(custom_generate="guided", control=...)
  lenvm export runs/q/model served --custom-generate --generator Qwen/Qwen2.5-3B-Instruct
                                                                    its generator, too: transformers serve served

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
    parser.add_argument(
        "--custom-generate", action="store_true", help="add what lets transformers' generate guide with it"
    )
    parser.add_argument(
        "--generator",
        metavar="NAME",
        help="with --custom-generate: put this generator there, and the value model into TARGET/lenvm",
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

    from ..decoding.shared_generate import INSIDE, write_custom_generate
    from ..models import adapters
    from ..models.hub import push_folder
    from ..models.model_card import CARD_FILE
    from ..pipeline.quiet import quieten
    from ..utils.locked_folder import full_disk_in_a_sentence

    quieten()
    if arguments.generator and not arguments.custom_generate:
        raise CheckpointError("--generator is copied for its generate: say --custom-generate, too")
    if arguments.generator and arguments.push:
        raise CheckpointError(
            "--push publishes a length value model; push a directory with its generator by `hf upload`"
        )
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
    target: Path = arguments.target / INSIDE if arguments.generator else arguments.target
    generator = _generator_of(arguments, processor) if arguments.generator else None
    with full_disk_in_a_sentence(f"Make room, delete {arguments.target}, then type the same command again."):
        if arguments.adapter:
            model.save_pretrained(target, processor)
        elif adapted:
            in_four_bits = model.config.base.get("quantise") is not None
            model.save_merged(target, processor, dtype or (torch.float32 if in_four_bits else None))
        else:
            (model.to(dtype) if dtype else model).save_pretrained(target, processor)
        card.save(target / CARD_FILE)
        if generator is not None:
            generator.model.save_pretrained(arguments.target)
            generator.processor.save_pretrained(arguments.target)
        if arguments.custom_generate:
            write_custom_generate(arguments.target, arguments.push or str(target.resolve()))
    _report(target, before, arguments.trust_remote_code)
    if arguments.custom_generate:
        print(f'{arguments.target}: custom_generate/generate.py for control="equal-to:96", with trust_remote_code=True')
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


def _generator_of(arguments: argparse.Namespace, processor: Any) -> "LocalGenerator":
    """The generator that is to lie in the same directory.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from ..models.processors import tokenizer_of
    from ..rollouts.generators.local import LocalGenerator
    from ..rollouts.generators.local.loading import require_same_vocabulary

    found = LocalGenerator.load(
        arguments.generator, dtype="auto", device="cpu", rows=1, trust_remote_code=arguments.trust_remote_code
    )
    if processor is not None:
        require_same_vocabulary(found.tokenizer, tokenizer_of(processor), arguments.source)
    return found


def _report(target: Path, before: "torch.Tensor", trust_remote_code: bool) -> None:
    from ..models.value_model import LengthValueModel

    written = LengthValueModel.from_pretrained(target, trust_remote_code=trust_remote_code).to(before.device)
    apart = float((_values_of(written) - before).abs().max())
    size = sum(file.stat().st_size for file in target.iterdir() if file.is_file())
    kind = "adapter and head" if written.config.base else f"whole weights, {written.backbone.dtype}"
    print(
        f"{target}: {kind}, {size / 1e6:,.1f} MB · gamma {written.gamma} · on {_COMPARED_TOKENS} tokens, "
        f"values differ from the source's by at most {apart:.1e}"
    )
