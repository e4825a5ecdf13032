"""Files that cannot be read, each in a sentence."""

import pytest

from lenvm_lightning.errors import CheckpointError, DataError, RecipeError
from lenvm_lightning.utils.reading import first_line, in_a_sentence, read_json_object


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1', "x.json is not valid JSON: it is not JSON: Expecting ',' delimiter .column 8."),
        (b"", "x.json is not valid JSON"),
        (b"\xff\xfe", "x.json is not valid JSON: it is not UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "x.json is not valid JSON: it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "x.json is not valid JSON: Exceeds the limit"),
        (b"[1]", "x.json must hold a JSON object, found list"),
        (b"3", "x.json must hold a JSON object, found int"),
    ],
)
def test_json_that_is_no_object(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as told:
        read_json_object(tmp_path / "x.json")
    assert str(told.value).endswith("Save or download the model again.")


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"x\.json cannot be read: No such file or directory\. Look\."):
        read_json_object(tmp_path / "x.json", RecipeError, "Look.")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_json_object(tmp_path)


def test_json_that_is_there(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1]}')
    assert read_json_object(tmp_path / "x.json") == {"a": [1]}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("weights"), "KeyError 'weights'."),
        (MemoryError(), "MemoryError."),
        (ValueError("one thing.\nand more"), "one thing."),
        (ValueError("wrong entry:\n   a number is missing\nand more"), "wrong entry: a number is missing."),
    ],
)
def test_errors_of_others_are_told_in_a_line(error, words):
    assert first_line(error) == words
    with pytest.raises(DataError) as told, in_a_sentence("x cannot be read", DataError, "Look."):
        raise error
    assert str(told.value) == f"x cannot be read: {words} Look."


def test_our_own_errors_and_stops_pass():
    with pytest.raises(RecipeError, match=r"^as it is$"), in_a_sentence("x"):
        raise RecipeError("as it is")
    with pytest.raises(KeyboardInterrupt), in_a_sentence("x"):
        raise KeyboardInterrupt
