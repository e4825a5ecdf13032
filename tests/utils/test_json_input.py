import json
import re

import pytest

from lenvm_lightning.utils.json_input import parse_json, parse_object, read_object


@pytest.mark.parametrize("value", [None, True, 3, -1.5, "é 漢 \n \u2028", [1, {"a": []}], {"": {"b": None}}, "😀"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_what_json_writes_is_read(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == parse_json(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "it is not JSON: Expecting property name enclosed in double quotes (column 2)"),
        (b'{"a": \n', "it is not JSON: Expecting value (column 6)"),  # and not in the next line
        ('{"a":\n 1', "it is not JSON: Expecting ',' delimiter (line 2, column 3)"),
        ("", "it is not JSON"),
        (b"\xff{}", "it is not UTF-8: invalid start byte at byte 0"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested too deeply"),
        ("9" * 5_000, "integer string conversion"),
        ('{"a": NaN}', "it holds NaN"),
        ('{"a": 1e400}', "it holds 1e400, which is beyond every number"),
        ("[-Infinity]", "it holds -Infinity"),
        ('"\\ud800"', "half of a character"),
        ('{"a": ["\\udfff"]}', "half of a character"),
        ('{"\\ud800": 1}', "half of a character"),
    ],
)
def test_everything_that_can_be_wrong_is_one_kind_of_error(text, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "found"), [("[]", "a list"), ("null", "null"), ("3", "a number"), ('"a"', "a text"), ("true", "true or")]
)
def test_only_objects_are_objects(text, found, tmp_path):
    with pytest.raises(ValueError, match=f"must hold a JSON object, found {found}"):
        parse_object(text)
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_object(tmp_path / "file.json")


def test_only_what_is_nested_counts_as_deep():
    assert parse_json("[" * 100 + "]" * 100)
    assert len(parse_json("[" + "[1]," * 1000 + "[2]]")) == 1001
    assert parse_json('["' + "[" * 1000 + '"]') == ["[" * 1000]
