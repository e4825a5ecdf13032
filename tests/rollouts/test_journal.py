"""The journal of a run, put right when its lines are torn or broken."""

import pytest
from sampled import open_store, sample, stopped


def test_a_line_torn_at_any_byte_is_repaired(tmp_path, whole):
    stopped(tmp_path, 4)
    journal = tmp_path / "journal.jsonl"
    content = journal.read_bytes()
    last = len(b"".join(content.splitlines(keepends=True)[:-1]))
    for end in [*range(last, len(content) - 3, 5), *range(len(content) - 3, len(content) + 1)]:
        journal.write_bytes(content[:end])
        with open_store(tmp_path) as store:
            kept = end >= len(content) - 1  # a record that lacks nothing but its line end is whole
            assert store.done == len(store.counts.lengths) == 3 + kept
            assert bool(store.notes) == (last < end < len(content) - 1)
        assert journal.read_bytes() == (content if kept else content[:last])
    journal.write_bytes(content[:-30])
    assert sample(tmp_path).rollouts.read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "reported"),
    [
        (lambda lines: [lines[0], lines[1][:40] + b"\n", *lines[2:]], "journal.jsonl:2: not a whole record"),
        (lambda lines: [b"\0" * 50 + b"\n", *lines], "journal.jsonl:1: not a whole record"),
        (lambda lines: [*lines, lines[1]], "journal.jsonl:7: completion"),
        (lambda lines: [*lines, lines[1].replace(b'"p/', b'"q/')], "'q/"),
        (lambda lines: [b"{}\n", b"[]\n", *lines, lines[0][:30]], "its last line was torn"),
    ],
)
def test_broken_lines_are_set_aside_and_sampled_again(tmp_path, whole, capsys, damage, reported):
    stopped(tmp_path, 6)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = damage(lines)
    journal.write_bytes(b"".join(damaged))
    assert sample(tmp_path).rollouts.read_bytes() == whole
    err = capsys.readouterr().err
    assert reported in err
    assert "set aside in broken.jsonl, sampled again" in err
    aside = (tmp_path / "broken.jsonl").read_bytes().splitlines(keepends=True)
    assert aside
    assert all(line in damaged for line in aside)
