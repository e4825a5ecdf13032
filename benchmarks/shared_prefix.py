r"""What is saved when completions of one prompt compute it once, in training.

A step, forward and backward, on n completions of one prompt: as padded rows, over a prompt cache, and as a tree. All
three are compared in values and gradients first, then timed interleaved in one process, medians of the rounds. Read the
ratios: times belong to the machine, and on a CPU are CPU seconds. The bound is that of the real tokens, n(P + C) to
P + nC; what rows lose to padding and to attention comes on top. `chosen` is the way that training takes by itself.

With images, rows run the vision tower for every completion and the two ways run it once.

    python benchmarks/shared_prefix.py                                # about two minutes on one core
    python benchmarks/shared_prefix.py --cases 8x256x64 16x64x96 --layers 4
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2Config, Qwen2Model

from lenvm_lightning.batch import Layout, LengthBatch
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.objectives import token_losses
from lenvm_lightning.training.batch_layouts import compute, row_logits
from lenvm_lightning.training.layout_plan import make_plan

GAMMA = 0.997
WAYS = ("rows", "cache", "tree")
IMAGE, PAD = 5, 0  # token ids of the vision-language model


def text_model(args: argparse.Namespace) -> LengthValueModel:
    """A random Qwen2 of the given shape."""
    config = Qwen2Config(vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
                         num_hidden_layers=args.layers, num_attention_heads=max(1, args.hidden // 64),
                         num_key_value_heads=max(1, args.hidden // 256), bos_token_id=None,
                         eos_token_id=None)  # fmt: skip
    return _with_head(Qwen2Model(config), args)


def vision_model(args: argparse.Namespace) -> LengthValueModel:
    """A random Qwen2.5-VL of the given shape, its tower frozen as in training."""
    text = {
        "vocab_size": args.vocabulary, "hidden_size": args.hidden, "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers, "num_attention_heads": max(1, args.hidden // 64),
        "num_key_value_heads": max(1, args.hidden // 256), "pad_token_id": PAD, "bos_token_id": None,
        "eos_token_id": None,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {"depth": args.tower_layers, "hidden_size": args.hidden, "intermediate_size": 3 * args.hidden,
              "num_heads": max(1, args.hidden // 64), "out_hidden_size": args.hidden,
              "fullatt_block_indexes": [0, args.tower_layers - 1]}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    model = _with_head(Qwen2_5_VLModel(config), args)
    for part in model.vision_modules():
        part.requires_grad_(False)
    return model


def _with_head(backbone: Any, args: argparse.Namespace) -> LengthValueModel:
    model = LengthValueModel(backbone, LenVMConfig(GAMMA))
    model.v_head.reset(0.0)
    return model.to(args.device).train()


def batches(
    count: int, prompt: int, completion: int, args: argparse.Namespace, side: int = 0
) -> dict[str, LengthBatch]:
    """The same rows, plain and shared: one prompt, completions of half to one and a half times the given length.

    Args:
        count: completions.
        prompt: tokens of the prompt, those of the image among them.
        completion: mean tokens of a completion.
        args: the command line.
        side: cells of an image's side, each one a token; 0 for none.
    """
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(10, args.vocabulary, (prompt,), generator=random)
    vision: dict[str, Tensor] = {}
    if side:
        ids[1 : 1 + side**2] = IMAGE
        pixels = torch.randn(4 * side**2, 3 * 2 * 14 * 14, generator=random).to(args.device)
        vision = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]).to(args.device)}
    sizes = [completion // 2 + completion * row // max(1, count - 1) for row in range(count)]
    width = prompt + max(sizes)
    input_ids = torch.cat(
        [ids.expand(count, -1), torch.randint(10, args.vocabulary, (count, max(sizes)), generator=random)], 1
    )
    lengths = torch.tensor([[prompt + size] for size in sizes])
    position = torch.arange(width)
    mask, supervised = position < lengths, (position < lengths) & (position >= prompt - 1)
    plain: dict[str, Any] = {
        "input_ids": (input_ids * mask).to(args.device),
        "attention_mask": mask.long().to(args.device),
        "remaining": ((lengths - 1 - position) * supervised).to(args.device),
        "mask": supervised.to(args.device),
        "vision": {name: torch.cat([tensor] * count) for name, tensor in vision.items()},
    }
    layout = Layout("shared", [prompt + size for size in sizes], [prompt] * count, [0] * count)
    shared: Any = {**plain, "vision": vision, "layout": layout}
    return {"rows": plain, "cache": shared, "tree": shared}  # type: ignore[dict-item]


def step(model: LengthValueModel, batch: LengthBatch, way: str) -> Tensor:
    """Forward and backward of the default loss; gradients are left in place. Returns the logits."""
    model.zero_grad(set_to_none=True)
    if way == "rows":
        logits = row_logits(model, batch)
    else:
        plan = make_plan(batch["layout"], [way], ordered=bool(batch["vision"]))
        logits = compute(model, batch, plan)[..., 0]
    rule = model.config.rule
    losses = token_losses(logits, rule.of(batch["remaining"]), batch["remaining"], "mse", rule)
    torch.where(batch["mask"], losses, 0.0).sum().backward()
    return logits.detach()


def check_parity(model: LengthValueModel, inputs: dict[str, LengthBatch]) -> dict[str, float]:
    """Largest difference of logits, and difference of the gradients as a share of their norm.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    logits, gradients = {}, {}
    there = inputs["rows"]["attention_mask"].bool()
    for way in WAYS:
        logits[way] = step(model, inputs[way], way)[there]
        gradients[way] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert logits["rows"].std() > 0, "constant values prove nothing"
    values = max(float((logits[way] - logits["rows"]).abs().max()) for way in WAYS)
    slopes = max(float((gradients[way] - gradients["rows"]).norm() / gradients["rows"].norm()) for way in WAYS)
    assert values <= 1e-4, f"values differ by {values}"
    assert slopes <= 1e-3, f"gradients differ by {slopes}"
    return {"values": values, "gradients": slopes}


def interleave(candidates: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of every candidate's calls, A B A B; on a CPU those that the process had it, not others."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(name: str, model: LengthValueModel, inputs: dict[str, LengthBatch], rounds: int) -> dict[str, Any]:
    """Compare, time and print one case."""
    parity = check_parity(model, inputs)  # warms up, too
    times = interleave(
        {way: lambda way=way: step(model, inputs[way], way) for way in WAYS},
        rounds,
        inputs["rows"]["input_ids"].device.type,
    )
    layout, has_images = inputs["tree"]["layout"], bool(inputs["tree"]["vision"])
    ways = WAYS[1:] if has_images else WAYS
    chosen = make_plan(layout, ways, ordered=has_images).way  # type: ignore[arg-type]
    real = make_plan(layout, ["tree"]).real  # type: ignore[list-item]
    row = {
        "case": name,
        "chosen": chosen,
        "speedup_ratio": times["rows"] / times[chosen],
        "bound_ratio": sum(layout.lengths) / real,
        **{f"{way}_speedup_ratio": times["rows"] / times[way] for way in WAYS[1:]},
        **{f"{way}_step_s": seconds for way, seconds in times.items()},
        "parity_max_difference": parity["values"],
        "parity_gradient_share": parity["gradients"],
    }
    print(
        f"{name:22}{times['rows']:>10.3f}" + "".join(f"{times['rows'] / times[way]:>9.2f}x" for way in WAYS[1:])
        + f"{row['bound_ratio']:>9.2f}x{chosen:>9}{parity['values']:>11.0e}", flush=True
    )  # fmt: skip
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["4x512x146", "16x1024x176", "16x64x96"],
                        metavar="NxPxC",
                        help="completions x tokens of the prompt x mean tokens of a completion")  # fmt: skip
    parser.add_argument("--vision-cases", nargs="*", default=["8x160x64"], metavar="NxPxC",
                        help="the same with an image of 100 tokens")  # fmt: skip
    parser.add_argument("--hidden", type=int, default=512, help="width of the backbone, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="its layers")
    parser.add_argument("--tower-layers", type=int, default=4, help="layers of the vision tower")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens of the vocabulary")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each way")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="seconds; tiny shapes, whose ratios mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.cases, args.vision_cases, args.hidden, args.rounds = ["3x40x12"], ["2x30x10"], 64, 1
        args.layers, args.tower_layers = 1, 1
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.layers} layers of width {args.hidden}, float32, {args.device}\n")
    print(
        f"{'n x prompt x mean':22}{'rows, s':>10}{'cache':>10}{'tree':>10}{'bound':>10}{'chosen':>9}{'difference':>11}"
    )
    rows = []
    model = text_model(args)
    for case in args.cases:
        rows.append(measure(case, model, batches(*map(int, case.split("x")), args), args.rounds))  # type: ignore[misc]
    if args.vision_cases:
        model = vision_model(args)
    for case in args.vision_cases:
        inputs = batches(*map(int, case.split("x")), args, side=4 if args.quick else 10)  # type: ignore[misc]
        rows.append(measure(f"{case} + image", model, inputs, args.rounds))
    print("\n" + json.dumps({"benchmark": "shared_prefix", "device": args.device, "layers": args.layers,
                             "hidden": args.hidden, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
