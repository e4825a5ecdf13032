"""Rollouts of the scripted generator: sampled to the end, or not quite."""

from pathlib import Path

from scripted import SAMPLING, Prompts, ScriptedGenerator, make_prompts

from lenvm_lightning.rollouts.sample import SamplingOutcome, sample_rollouts
from lenvm_lightning.rollouts.store import RolloutStore, rollout_settings

N = 3


def sample(
    folder: Path, generator: ScriptedGenerator | None = None, prompts: Prompts | None = None, n: int = N
) -> SamplingOutcome:
    """Sample ``n`` completions of eight prompts, or of those given."""
    return sample_rollouts(generator or ScriptedGenerator(), prompts or make_prompts(8), n, folder, SAMPLING)


def open_store(folder: Path) -> RolloutStore:
    """The store that `sample` writes into."""
    prompts = make_prompts(8)
    settings = rollout_settings(ScriptedGenerator().fingerprint(), prompts, N, SAMPLING)
    return RolloutStore(folder, prompts, settings, "scripted")


def stopped(folder: Path, after: int) -> None:
    """A run whose generator dies."""
    with open_store(folder) as store:
        for _, answer in zip(range(after), ScriptedGenerator().sample(store.missing(), SAMPLING), strict=False):
            store.add_answer(answer)
