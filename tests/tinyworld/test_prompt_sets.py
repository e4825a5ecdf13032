import numpy as np
import pytest

from lenvm_lightning.errors import DataError
from lenvm_lightning.tinyworld import prompt_sets


@pytest.mark.parametrize("name", prompt_sets.SETS)
def test_prompt_sets(name):
    both, train, test = (prompt_sets.prompt_set(name, split, 200) for split in (None, "train", "test"))
    assert [p.prompt_id for p in prompt_sets.prompt_set(name, None, 50)] == [p.prompt_id for p in both[:50]]
    assert {p.split for p in train} == {"train"}
    assert {p.split for p in test} == {"test"}
    assert [p.prompt_id for p in both if p.split == "train"] == [p.prompt_id for p in train][: len(both)][
        : sum(p.split == "train" for p in both)
    ]
    key = {(p.messages[0]["content"], *(image.tobytes() for image in p.images)) for p in [*train, *test]}
    assert len(key) == 400
    assert 0.02 < np.mean([p.split == "test" for p in both]) < 0.2
    assert all(len(p.images) == p.messages[0]["content"].count("<image>") for p in both)
    assert prompt_sets.prompt_set(name, None, 5, seed=1)[0].messages != both[0].messages


def test_prompt_set_errors():
    with pytest.raises(DataError, match="did you mean 'tiny-math'"):
        prompt_sets.prompt_set("tiny-maths")
    with pytest.raises(DataError, match="train or test"):
        prompt_sets.prompt_set("tiny-math", "val")


@pytest.mark.parametrize(("meta", "text", "tokens", "verdict"), [
    ({"answer": "7"}, "4 + 3 = 7. \\boxed{7}", 9, True),
    ({"answer": "7"}, "\\boxed{7} no, \\boxed{8}", 9, False),
    ({"answer": "7"}, "7", 2, False),
    ({"constraint": "equal to", "length": 100}, "x", 111, True),
    ({"constraint": "equal to", "length": 100}, "x", 112, False),
    ({"constraint": "at most", "length": 100}, "x", 101, True),
    ({"constraint": "at most", "length": 100}, "x", 102, False),
    ({"constraint": "at least", "length": 100}, "x", 101, True),
    ({"constraint": "at least", "length": 100}, "x", 100, False),
    ({}, "x", 5, None),
])  # fmt: skip
def test_checks(meta, text, tokens, verdict):
    assert prompt_sets.check(meta, text, tokens) is verdict
