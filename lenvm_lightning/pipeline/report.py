"""What a run leaves behind for people: a table, a model card, the next commands."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .. import __version__, tinyworld
from ..metrics import POSITION_NAMES, POSITIONS
from ..models import embedded
from ..models.adapters import ADAPTER_CONFIG, count_parameters
from ..models.lenvm_config import LenVMConfig
from ..models.model_card import model_card
from ..tinyworld import quality
from ..training.module import LenVMModule


def as_results(module: Any, data: Any, steps: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Everything a run found, as plain numbers with their units in the keys.

    A run may also train something else than a length value model: a generator of the tiny world.
    """
    parameters, trained = count_parameters(module.model)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lightning")}
    return {
        "format": 1,
        "optimizer_steps": steps,
        **(_of_lenvm(module, data) if isinstance(module, LenVMModule) else _of_generator(data)),
        "parameters": parameters,
        "trained_parameters": trained,
        "metrics": {name.removeprefix("val/"): value for name, value in sorted(metrics.items())},
        "versions": {"lenvm-lightning": __version__, **versions},
    }


def _of_lenvm(module: Any, data: Any) -> dict[str, Any]:
    config, loss = module.model.config, module.settings.loss
    return {
        "gamma": config.gamma,
        "target": config.target,
        **({} if config.until is None else {"until": config.until}),
        "objective": {"loss": loss.kind, "weight": loss.weight, "lam": loss.lam, "censored": loss.censored},
        "backbone": config.backbone,
        "train_prompts": data.facts.prompts,
        "train_completions": data.facts.completions,
        "train_completions_per_prompt": data.facts.completions / data.facts.prompts,
        "held_out_completions": len(data.val_rows),
        "held_out_prompts": data.val_prompts,
        "held_out_digest": data.held_out_digest(),
        "tiny_world": any(map(embedded.wrote, data.facts.generators)),
    }


def _of_generator(data: Any) -> dict[str, Any]:
    return {"tiny_world": True, "prompts": "tiny-vqa" if data.kind == "vision" else "tiny-math"}


def as_table(results: dict[str, Any]) -> str:
    """Errors by position beside the best constant, in columns."""
    m = results["metrics"]
    notice = f" · {tinyworld.NOTICE}" if results["tiny_world"] else ""
    if "gamma" not in results:
        figures = f"\n\n{quality.as_table(results['quality'])}" if results.get("quality") else ""
        return f"{_loss(m)} · {results['optimizer_steps']} steps{notice}{figures}"
    lines = [
        f"{results['held_out_completions']} held-out completions of {results['held_out_prompts']} prompts · "
        f"gamma {results['gamma']:.5f} · {results['optimizer_steps']} steps{_until(results)}{notice}",
        "",
        "| mean absolute error, tokens ↓ | LenVM | best constant | gain |",
        "|---|---:|---:|---:|",
    ]
    for position in POSITIONS:
        if f"mae_tokens/{position}" in m:
            ours, constant = m[f"mae_tokens/{position}"], m[f"mae_tokens_constant/{position}"]
            lines.append(f"| {POSITION_NAMES[position]} | {ours:.1f} | {constant:.1f} | {_gain(ours, constant)} |")
    if "mre" in m:
        lines.append(f"| prompt-boundary MRE | {m['mre']:.3f} | {m['mre_constant']:.3f} | "
                     f"{_gain(m['mre'], m['mre_constant'])} |")  # fmt: skip
    lines.append(f"\n{_loss(m)}")
    return "\n".join(lines)


def _until(results: dict[str, Any]) -> str:
    return f" · tokens to {results['until']!r}" if "until" in results else ""


def _loss(metrics: Mapping[str, float]) -> str:
    return f"validation loss {metrics['loss']:.5f}" if "loss" in metrics else "not validated"


def _gain(ours: float, constant: float) -> str:
    return f"{1 - ours / constant:+.0%}" if constant > 0 else "–"


def next_commands(folder: Path, results: dict[str, Any]) -> str:
    """What to type next."""
    model, rollouts = folder / "model", Path("rollouts") / folder.name
    adapter = f"whole:   lenvm export {folder} {folder.name}-whole\n" if (model / ADAPTER_CONFIG).exists() else ""
    has_curves = any(folder.rglob("events.out.tfevents.*"))
    curves = f"curves:  tensorboard --logdir {folder.parent}\n" if has_curves else ""
    return f"\nmodel:   {model}\n{adapter}{curves}" + (
        f'python:  from lenvm_lightning import LengthValueModel; LengthValueModel.from_pretrained("{model}")'
        if "gamma" in results
        else f"sample:  lenvm sample --generator {model} --prompts {results['prompts']} --out {rollouts}"
    )


def card_of_run(config: LenVMConfig, results: dict[str, Any], settings: dict[str, Any]) -> ModelCard:
    """README of the model directory."""
    import yaml

    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    details = f"""## Results

{as_table(results)}

Trained on {results["train_completions"]:,} completions; {results["parameters"]:,} parameters, of which
{results["trained_parameters"]:,} trained; {versions}.

## Settings

```yaml
{yaml.safe_dump(settings, sort_keys=False)}```
"""
    return model_card(config, metrics=results["metrics"], details=details)
