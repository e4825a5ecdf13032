"""Cells of data sets: plain values, with nothing opened and nothing decoded by others."""

import datasets
import pyarrow as pa

from lenvm_lightning.rollouts.cells import cells_of, first_error

TEXT = datasets.Value("string")


def cells(values, feature, kind=None):
    kind = kind or datasets.Features({"x": feature}).arrow_schema.field("x").type
    return cells_of(pa.chunked_array([pa.array(values, kind)]), "x", feature)


def test_values_are_plain():
    assert cells([1, None], datasets.Value("int64")) == [1, None]
    assert cells([[1, 2], [], None], datasets.List(datasets.Value("int64"))) == [[1, 2], [], None]
    assert cells([{"role": "user", "content": "?"}], {"role": TEXT, "content": TEXT}) == [
        {"role": "user", "content": "?"}
    ]
    assert cells([1, None], datasets.ClassLabel(names=["easy", "hard"])) == ["hard", None]


def test_media_stay_as_they_are():
    image = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0", "path": "/private/a.png"}
    assert cells([image, None], datasets.Image()) == [image, None]
    assert cells([[image]], datasets.List(datasets.Image())) == [[image]]


def test_columns_of_mixed_kinds_are_read():
    data = datasets.Dataset.from_dict({"x": [[{"a": 0}, {"a": "b"}], [3, None]]}, on_mixed_types="use_json")
    table = data.with_format("arrow")[:]
    assert cells_of(table["x"], "x", data.features["x"]) == [[{"a": 0}, {"a": "b"}], [3, None]]
    deep = "[" * 100_000 + "]" * 100_000
    one, two = cells(["[1]", deep], datasets.Json(), pa.string())
    assert one == [1]
    assert str(two).startswith("x: it is nested too deeply")
    assert first_error({"a": 1, "x": two}) is two
    assert first_error({"a": 1, "x": one}) is None


def test_a_cell_that_is_no_text_leaves_the_others():
    column = pa.chunked_array([pa.array([b"fine", b"\xff", None, b"too"], pa.binary()).view(pa.string())])
    found = cells_of(column, "q", TEXT)
    assert [found[0], *found[2:]] == ["fine", None, "too"]
    assert str(found[1]) == "q: it is not UTF-8: invalid start byte at byte 0"
