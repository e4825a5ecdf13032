"""YAML of people: plain data, bounded, with the place of what is wrong."""

import time
import tracemalloc

import pytest

from lenvm_lightning.errors import RecipeError
from lenvm_lightning.utils.plain_yaml import (
    MOST_BYTES,
    MOST_LEVELS,
    MOST_NODES,
    parse_yaml,
    parse_yaml_with_lines,
    read_yaml_file,
)

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
LADDER = "a: &a [[[[[[[[[[x]]]]]]]]]]\n" + "".join(  # each line is shallow, written out they are not
    f"{name}: &{name} [[[[[[[[[[*{before}]]]]]]]]]]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


def test_plain_data_are_read():
    text = "a: [1, 2.5, true, no, null, x]\nb: {c: 2024-01-01, d: =}\n"
    assert parse_yaml(text) == {"a": [1, 2.5, True, False, None, "x"], "b": {"c": "2024-01-01", "d": "="}}
    assert parse_yaml("") is None
    assert parse_yaml("3") == 3


def test_lines_of_keys_twice_where_they_are_twice():
    assert parse_yaml_with_lines("a:\n  b: 1\n  b: 2\nc: [{d: 1}]\n")[1] == [
        (("a",), 1), (("a", "b"), 2), (("a", "b"), 3), (("c",), 4), (("c", "0", "d"), 4),
    ]  # fmt: skip


def test_aliases_stand_for_copies():
    found = parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    found["a"]["x"] = 3
    assert found == {"a": {"x": 3}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, f"line 5, column 8: more than {MOST_NODES:,} keys and values, aliases written out"),
        (MERGE_BOMB, "keys and values, aliases written out"),
        ("a: &a {b: *a}", "line 1, column 11: the alias \\*a is part of what it stands for"),
        ("&a [*a]", "is part of what it stands for"),
        ("[" * 10_000 + "]" * 10_000, f"more than {MOST_LEVELS} levels deep"),
        ("- " * 10_000, f"more than {MOST_LEVELS} levels deep"),
        (LADDER, f"line 5, column .*more than {MOST_LEVELS} levels deep"),
        ("[" + "x," * MOST_NODES + "]", "keys and values"),
        ("a: [b", "line 1, column 6: while parsing a flow sequence, expected"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: b\n---\na: b\n", "found another document"),
        ("x:\n  y: " + "9" * 5000, "line 2, column 6: '9999.*' cannot be read as int"),
        ("x: !!int y", "'y' cannot be read as int"),
        ("x: !!bool y", "'y' cannot be read as bool"),
        ("x: !!timestamp y", "could not determine a constructor for the tag"),
        ("x: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("x: !!binary aGk=", "could not determine a constructor for the tag"),
        ("? [a]\n: b", "found unhashable key"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_what_cannot_be_is_said_with_its_place(text, words):
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)


def test_a_bomb_takes_neither_memory_nor_time():
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(ValueError, match="aliases written out"):
        parse_yaml(BOMB)
    assert time.process_time() - begin < 1.0
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "r.yaml is not valid YAML: .*codec"),
        (b"a: [b", "r.yaml is not valid YAML: line 1, column 6"),
        (b"#" * (MOST_BYTES + 1), "r.yaml is larger than 1 MiB"),
    ],
)
def test_files_that_cannot_be_are_named(tmp_path, content, words):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        read_yaml_file(tmp_path / "r.yaml", RecipeError)


def test_files(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        read_yaml_file(tmp_path, RecipeError)
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")  # an editor's byte order mark
    assert read_yaml_file(tmp_path / "r.yaml", RecipeError) == ({"a": 1}, [(("a",), 1)])
