r"""Thinking that ends within its budget: softly by a value model of segments, beside the hard cut and a ramped bias.

A laboratory: `tiny-text` learns stories whose steps stand between ``<think>`` and ``</think>``, each mark one token, as
in models that think (`tinyworld.thinking`); a value model learns from its completions how many tokens are left to the
end of the thinking. Then held-out stories are answered under budgets of the thinking:

    base model   no control
    hard cut     what servers do: when the budget is used up, ``</think>`` is forced
    ramp         beside that, a bias on ``</think>`` that grows over the last part of the budget
    AtMost       AtMost(n, until="</think>"); with less strength; and kept above 70% of the budget, as whole texts are
    EqualTo      EqualTo(n, until="</think>")

How to read the table: *within* is the share of thinking that ends within the budget, *thinking* its mean tokens,
*whole* the share of thinking that ends with a whole sentence, *right* that of right answers, *log p* what the generator
gives a token of the whole completion, in nats. Intervals are 95%, by bootstrap over questions; the columns at the end
compare with the hard cut on the very same questions. Sampling: temperature 1, top-k 15, top-p .999.

    python benchmarks/segments.py                         # generator, rollouts, value model and table
    python benchmarks/segments.py --stage generator       # only so far; what is there is not made again
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lenvm_lightning import tinyworld
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.decoding.segments import tokens_until
from lenvm_lightning.evaluation.segment_rivals import HardCut, Ramp
from lenvm_lightning.guidance import AtMost, Control, EqualTo
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.pipeline.run_recipe import run_recipe
from lenvm_lightning.rollouts.generators.interface import GeneratedText, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.tinyworld.datamodule import TinyCorpus
from lenvm_lightning.tinyworld.prompt_sets import prompt_set
from lenvm_lightning.tinyworld.thinking import BEGIN, END
from lenvm_lightning.training.optimizers import warmup_and_cosine
from lenvm_lightning.utils.boxed import last_boxed

MAX_TOKENS = 512
SEED_OF_PROMPTS = 1000  # far from those of the rollouts


class ThinkingCorpus(TinyCorpus):
    """Documents with marks, in a tokenizer that has a token for each of them.

    Args:
        tokenizer: that of the generator.
        settings: of `TinyCorpus`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__("thinking", **settings)
        self._processor = tokenizer


def train_generator(folder: Path, args: argparse.Namespace) -> None:
    """Teach `tiny-text` to think between marks, from its own weights."""
    torch.manual_seed(0)
    tokenizer = load_processor("tiny-text")
    tokenizer.add_tokens([BEGIN, END])
    model = AutoModelForCausalLM.from_pretrained(tinyworld.path("tiny-text"), dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    data = ThinkingCorpus(tokenizer, documents=args.documents, val_documents=200, max_length=512, batch_tokens=4096)
    data.setup()
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.generator_lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = warmup_and_cosine(optimizer, 20, len(loader))
    model.train()
    began = time.perf_counter()
    for step, batch in enumerate(loader):
        loss = _loss(model, batch, prompt_weight=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"[{time.perf_counter() - began:4.0f} s] {step}/{len(loader)}: {loss.item():.3f} nats", flush=True)
    model.eval()
    with torch.no_grad():
        held_out = [_loss(model, batch, prompt_weight=0.0).item() for batch in data.val_dataloader()]
    print(f"generator: {sum(held_out) / len(held_out):.3f} nats a token on new documents", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _loss(model: Any, batch: dict[str, Any], prompt_weight: float) -> torch.Tensor:
    """Weighted mean over the tokens of a batch (nats)."""
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    weight = torch.where(batch["completion"][:, 1:], 1.0, prompt_weight) * batch["attention_mask"][:, 1:]
    return (losses * weight).sum() / weight.sum()


def write_rollouts(generator: Path, file: Path, args: argparse.Namespace) -> None:
    """Sample completions of training stories and of a few held-out ones."""
    local = LocalGenerator.load(str(generator))
    prompts = [
        *prompt_set("tiny-think", "train", args.prompts),
        *prompt_set("tiny-think", "test", max(args.prompts // 12, 4)),
    ]
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    requests = [PromptRequest(prompt, tuple(range(args.completions))) for prompt in prompts]
    lines = []
    for answer in local.sample(requests, SamplingParams(max_tokens=MAX_TOKENS, seed=0)):
        assert isinstance(answer.result, GeneratedText), answer.result
        prompt, written = by_id[answer.prompt_id], answer.result
        lines.append({
            "prompt_id": prompt.prompt_id, "messages": prompt.messages, "split": prompt.split,
            "completion": written.text, "token_ids": written.token_ids, "finish_reason": written.finish_reason,
            "generator": str(generator),
        })  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"rollouts: {len(lines)} completions, {sum(END in line['completion'] for line in lines)} with {END}")


RECIPE = """\
fit:
  model:
    class_path: lenvm_lightning.TextLenVM
    init_args:
      backbone: {generator}
      gamma: auto
      optimizer: {{lr: 1.0e-3, weight_decay: 0.1, betas: [0.9, 0.98]}}
  data:
    class_path: datamodules.TextRollouts
    init_args: {{files: {rollouts}, until: "{until}", max_length: 768, batch_tokens: 4096}}
  trainer: {{max_epochs: {epochs}}}
"""


def train_value_model(folder: Path, args: argparse.Namespace) -> None:
    """Learn how many tokens are left to the end of the thinking, with a recipe as anybody would."""
    recipe = folder / "segments.yaml"
    places = {name: (folder / name).resolve() for name in ("generator", "rollouts.jsonl")}
    recipe.write_text(
        RECIPE.format(generator=places["generator"], rollouts=places["rollouts.jsonl"], until=END, epochs=args.epochs),
        encoding="utf-8",
    )
    if run_recipe(str(recipe), [], runs=folder, name="lenvm"):
        raise SystemExit("the value model could not be trained, see above")


# -- what is measured ---------------------------------------------------------------------------------------------


def systems(budgets: list[int], ramps: list[float]) -> dict[str, dict[int, Control]]:
    """Controls of each system by budget."""
    found: dict[str, dict[int, Control]] = {"hard cut": {n: HardCut(n, END) for n in budgets}}
    for most in ramps:
        found[f"ramp to {most:g} nats"] = {n: Ramp(n, END, most=most) for n in budgets}
    found["AtMost"] = {n: AtMost(n, until=END) for n in budgets}
    found["AtMost, strength=10"] = {n: AtMost(n, strength=10.0, until=END) for n in budgets}
    found["AtMost, low=0.7"] = {n: AtMost(n, low=0.7, until=END) for n in budgets}
    found["EqualTo"] = {n: EqualTo(n, until=END) for n in budgets}
    return found


def answer(
    local: LocalGenerator, lenvm: LengthValueModel, control: Control | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a completion of held-out stories."""
    local.lenvm = lenvm if control is not None else None
    prompts = prompt_set("tiny-think", "test", args.questions, seed=SEED_OF_PROMPTS)
    answers = {prompt.prompt_id: prompt.meta["answer"] for prompt in prompts}
    requests = [PromptRequest(prompt, tuple(range(args.samples)), control) for prompt in prompts]
    params = SamplingParams(max_tokens=MAX_TOKENS, top_k=15, top_p=0.999, seed=0)
    rows = []
    for one in local.sample(requests, params):
        assert isinstance(one.result, GeneratedText), one.result
        ids = one.result.token_ids
        thinking = tokens_until(ids, END, local.tokenizer)
        before, _, after = one.result.text.partition(END)
        rows.append({
            "question": one.prompt_id, "tokens": len(ids), "thinking": thinking or len(ids), "ended": bool(thinking),
            "whole": bool(thinking) and before.rstrip().endswith((".", "!", "?")),
            "right": bool(thinking) and last_boxed(after) == answers[one.prompt_id], "logprob": one.result.logprob,
        })  # fmt: skip
    return rows


class Table:
    """Figures of the systems, by question; see the module.

    Args:
        runs: rows of each system and budget; that of the base model has the budget 0.
    """

    def __init__(self, runs: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
        self.runs = runs
        self.questions = sorted({row["question"] for rows in runs.values() for row in rows})
        self._sums = {key: self._by_question(key[1], rows) for key, rows in runs.items()}

    def _by_question(self, budget: int, rows: list[dict[str, Any]]) -> np.ndarray:
        """Sums over the completions of each question. Shape (questions, figures)."""
        place = {question: number for number, question in enumerate(self.questions)}
        sums = np.zeros((len(place), 7))
        for row in rows:
            within = row["ended"] and (not budget or row["thinking"] <= budget)
            figures = (1, within, row["thinking"], row["whole"], row["right"], row["logprob"], row["tokens"])
            sums[place[row["question"]]] += figures
        return sums

    def figures(self, key: tuple[str, int], weights: np.ndarray) -> dict[str, float]:
        """Of one system and budget, its questions counted so often. Weights: shape (questions,)."""
        count, within, thinking, whole, right, logprob, tokens = weights @ self._sums[key]
        return {
            "within": within / count, "thinking": thinking / count, "whole": whole / count, "right": right / count,
            "logprob": logprob / tokens,
        }  # fmt: skip

    def gain(self, key: tuple[str, int], name: str, weights: np.ndarray) -> float:
        """What a system is ahead of the hard cut by, where that thinks for as many tokens in the mean."""
        ours = self.figures(key, weights)
        cuts = [one for one in self._sums if one[0] in ("hard cut", "base model")]
        curve = sorted((self.figures(one, weights)["thinking"], self.figures(one, weights)[name]) for one in cuts)
        return ours[name] - float(np.interp(ours["thinking"], *zip(*curve, strict=True)))

    def lines(self, resamples: int = 1000) -> tuple[list[str], list[dict[str, Any]]]:
        """The table, and its rows as plain numbers."""
        rng = np.random.default_rng(0)
        size = len(self.questions)
        draws = [np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(resamples)]
        head = "| system | budget | within ↑ | thinking | whole ↑ | right ↑ | log p ↑ | right, gain | whole, gain |"
        lines, rows = [head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|"], []
        for key in self.runs:
            row: dict[str, Any] = {"system": key[0], "budget": key[1]}
            functions = {name: partial(self._figure, key, name) for name in _SHOWN}
            if key[0] not in ("base model", "hard cut"):
                functions |= {f"{name}_gain": partial(self.gain, key, name) for name in ("right", "whole")}
            for name, function in functions.items():
                low, high = np.percentile([function(draw) for draw in draws], (2.5, 97.5))
                row[name] = [function(np.ones(size)), float(low), float(high)]
            rows.append(row)
            lines.append(f"| {key[0]} | {key[1] or '–'} | {' | '.join(_cells(row))} |")
        return lines, rows

    def _figure(self, key: tuple[str, int], name: str, weights: np.ndarray) -> float:
        return self.figures(key, weights)[name]


_SHOWN = ("within", "thinking", "whole", "right", "logprob")


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for name in (*_SHOWN, "right_gain", "whole_gain"):
        if name not in row:
            cells.append("")
            continue
        mean, low, high = row[name]
        form = {"thinking": ".1f", "logprob": ".3f"}.get(name, "+.3f" if name.endswith("gain") else ".3f")
        cells.append(f"{mean:{form}} ({low:{form}} … {high:{form}})")
    return cells


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Answer held-out stories under every system and budget."""
    local = LocalGenerator.load(str(folder / "generator"))
    lenvm = LengthValueModel.from_pretrained(folder / "lenvm" / "model", dtype="float32").eval()
    file = folder / "answers.json"
    settings = {"questions": args.questions, "samples": args.samples}
    stored = json.loads(file.read_text()) if file.exists() else {}
    done = stored["runs"] if stored.get("settings") == settings else {}
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    asked: list[tuple[str, int, Control | None]] = [("base model", 0, None)]
    for name, controls in systems(args.budgets, args.ramps).items():
        asked += [(name, n, control) for n, control in controls.items()]
    for name, n, control in asked:
        key = repr(control)
        if key not in done:
            began = time.perf_counter()
            done[key] = answer(local, lenvm, control, args)
            file.write_text(json.dumps({"settings": settings, "runs": done}))
            print(f"[{time.perf_counter() - began:3.0f} s] {key}", flush=True)
        runs[name, n] = done[key]
    lines, rows = Table(runs).lines(args.resamples)
    print(f"{tinyworld.NOTICE}\n{args.questions} held-out stories x {args.samples} completions\n")
    print("\n".join(lines))
    return {"benchmark": "segments", **settings, "gamma": lenvm.gamma, "until": lenvm.config.until, "rows": rows}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    generator, rollouts = args.out / "generator", args.out / "rollouts.jsonl"
    if not generator.exists():
        train_generator(generator, args)
    if args.stage in ("all", "rollouts") and not rollouts.exists():
        write_rollouts(generator, rollouts, args)
    if args.stage == "all":
        if not (args.out / "lenvm" / "model").exists():
            train_value_model(args.out, args)
        print(json.dumps(measure(args.out, args)))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/segments"), help="folder of models, rollouts and answers"
    )
    parser.add_argument("--stage", choices=["generator", "rollouts", "all"], default="all", help="how far to go")
    parser.add_argument("--documents", type=int, default=20_000, help="that the generator learns from")
    parser.add_argument("--generator-lr", type=float, default=1.5e-3, help="its peak learning rate")
    parser.add_argument("--prompts", type=int, default=800, help="of the rollouts to train on")
    parser.add_argument("--completions", type=int, default=6, help="of each of them")
    parser.add_argument("--epochs", type=int, default=2, help="of the value model")
    parser.add_argument("--questions", type=int, default=150, help="held-out stories that are answered")
    parser.add_argument("--samples", type=int, default=3, help="completions of each of them")
    parser.add_argument("--budgets", type=int, nargs="+", default=[24, 40, 64, 96], help="tokens of the thinking")
    parser.add_argument("--ramps", type=float, nargs="+", default=[10.0], help="largest bias, nats")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--quick", action="store_true", help="a minute instead of half an hour; the numbers mean nothing"
    )
    args = parser.parse_args()
    if args.quick:
        args.documents, args.prompts, args.completions, args.epochs = 100, 24, 2, 1
        args.questions, args.samples, args.budgets, args.ramps, args.resamples = 4, 2, [24], [10.0], 20
    return args


if __name__ == "__main__":
    main()
