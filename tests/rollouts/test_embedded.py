import pytest

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.embedded import is_rollouts, make_prompts, prompt_sets, write_rollouts
from lenvm_lightning.tinyworld.prompt_sets import SETS


def test_the_prompt_sets_of_the_tiny_world_are_known():
    assert prompt_sets() == tinyworld.PROMPT_SETS == tuple(SETS)
    for name in prompt_sets():
        three = make_prompts(name, "test", 3, 1)
        assert [prompt.prompt_id.partition("/")[0] for prompt in three] == [name] * 3
        assert {prompt.split for prompt in three} == {"test"}
    with pytest.raises(DataError, match="train or test"):
        make_prompts("tiny-math", "val", 3, 0)


def test_the_scripted_rollouts_are_written_once(tmp_path):
    assert is_rollouts("tinyworld")
    assert not is_rollouts("rollouts/mine.jsonl")
    file = write_rollouts("tinyworld", "text", tmp_path)
    stamp = file.stat().st_mtime_ns
    assert write_rollouts("tinyworld", "text", tmp_path).stat().st_mtime_ns == stamp
