"""The DataModules as a whole: what is held out, what is said about the data."""

import json

import pytest

from datamodules import TextRollouts
from datamodules.report import collect_facts, describe_facts


def line(prompt, split=None, **more):
    record = {"prompt_id": prompt, "messages": [{"role": "user", "content": f"Say {prompt}."}], "completion": "Yes."}
    return json.dumps({**record, **({"split": split} if split else {}), **more}) + "\n"


@pytest.fixture
def set_up(tmp_path):
    def set_up(*lines, **settings):
        file = tmp_path / "rollouts.jsonl"
        file.write_text("".join(lines))
        data = TextRollouts(str(file), processor="tiny-text", cache_dir=str(tmp_path / "cache"), **settings)
        data.setup("fit")
        return data

    return set_up


def facts(cut):
    lengths = [*range(10, 110), *[200] * cut]
    rows = len(lengths)
    return collect_facts(lengths, [n == 200 for n in lengths], ["a"] * rows, [""] * rows, [""] * rows)


def test_a_gamma_that_cuts_make_too_small_is_said_to_be():
    text = describe_facts(facts(cut=0), 5, 1, 0.1, 3)
    assert "gamma suggested 0.9" in text
    assert "≥" not in text
    text = describe_facts(facts(cut=1), 5, 1, 0.1, 3)  # under 1%: the percentile is known, the longest is not
    assert "99th percentile 109, longest ≥ 200" in text
    assert "at least" not in text
    text = describe_facts(facts(cut=50), 5, 1, 0.1, 3)
    assert "median 84 tokens, 99th percentile ≥ 200, longest ≥ 200" in text
    assert "gamma suggested at least 0.97724" in text
    assert "`gamma: auto` may be too small" in text
    assert "median ≥ 200 tokens" in describe_facts(facts(cut=150), 5, 1, 0.1, 3)
