"""Variants of a run: each in a process and a folder of its own."""

import pytest

from lenvm_lightning.errors import RecipeError
from lenvm_lightning.pipeline import variants as stages
from lenvm_lightning.pipeline.allowed_imports import imports_from
from lenvm_lightning.pipeline.variants import run_variants


def test_a_variant_of_other_settings_is_not_taken_for_done(here):
    """Its results were there, and it was left alone."""
    variant = here / "run" / "variants" / "low"
    variant.mkdir(parents=True)
    for name in ("recipe.yaml", "results.json"):
        (variant / name).write_text("{}")
    recipe = {"fit": {"model": {"init_args": {}}}, "variants": {"runs": {"low": {"fit.model.gamma": 0.9}}}}
    assert run_variants(recipe, here / "run") == 0
    recipe["variants"]["runs"]["low"] = {"fit.model.gamma": 0.8}
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"low: .*gamma: 0.9 -> 0.8"):
            run_variants(recipe, here / "run")


def test_a_variant_is_no_process_of_a_distributed_run(here, monkeypatch):
    seen, commands = [], []

    class Done:
        returncode = 0

        def __init__(self, command, env, **rest):
            seen.append(env)
            commands.append(command)

        def poll(self):
            return 0

    monkeypatch.setattr(stages.subprocess, "Popen", Done)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    recipe = {"fit": {"model": {"init_args": {}}}, "variants": {"runs": {"low": {"fit.model.gamma": 0.9}}}}
    with imports_from(["mine", "theirs"]):
        assert run_variants(recipe, here / "run") == 0
    [environment], [command] = seen, commands
    assert [word for word in command if "allow" in word] == ["--allow-import=mine", "--allow-import=theirs"]
    assert not [name for name in environment if "RANK" in name or "WORLD" in name or "MASTER" in name]
    assert "PATH" in environment
