"""Rows of data sets, wherever these lie."""

import json
from datetime import datetime

import datasets
import pyarrow as pa
import pytest
from prompt_rows import ROWS, as_parquet, texts
from pyarrow import parquet

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.prompts.rows import DatasetRows, JsonlRows
from lenvm_lightning.rollouts.prompts.sources import READY_MADE


def as_jsonl(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def as_arrow(folder):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_one_file(folder):
    return as_parquet(folder) / "train.parquet"


@pytest.mark.parametrize("save", [as_parquet, as_jsonl, as_arrow, as_one_file])
def test_local_data_sets(save, tmp_path):
    path = str(save(tmp_path))
    source = {"path": path, "columns": {"prompt": "text", "id": "key", "meta": {"sort": "kind"}}, "label": "mine"}
    prompts = load_prompts(source)
    assert prompts.ids == [f"mine/k{i}" for i in range(6)]
    assert texts(prompts) == [row["text"] for row in ROWS]
    assert [prompt.meta for prompt in prompts] == [{"sort": i % 2} for i in range(6)]
    assert {prompt.split for prompt in prompts} == {"train"}
    assert prompts.description["digest"] == load_prompts(source).description["digest"]
    assert prompts.description["count"] == 6
    assert prompts.description["sources"] == [source]


def test_class_labels_and_times_are_remembered_as_words(tmp_path):
    sort, at = datasets.ClassLabel(names=["easy", "hard"]), datasets.Value("timestamp[s]")
    features = datasets.Features({"prompt": datasets.Value("string"), "sort": sort, "at": at})
    row = {"prompt": "?", "sort": 1, "at": datetime(2026, 1, 2)}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "d")
    source = {"path": str(tmp_path / "d"), "columns": {"prompt": "prompt", "meta": ["sort", "at"]}}
    assert load_prompts(source)[0].meta == {"sort": "hard", "at": "2026-01-02 00:00:00"}


def test_a_data_set_whose_description_is_broken_is_named(tmp_path):
    schema = datasets.Features({"q": datasets.Value("string")}).arrow_schema
    broken = schema.with_metadata({b"huggingface": b'{"info": {"features": {"q": "x"}}}'})
    parquet.write_table(pa.Table.from_pylist([{"q": "?"}], schema=broken), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"the data set '.*d\.parquet' cannot be read: \w+: "):
        load_prompts({"path": str(tmp_path / "d.parquet"), "columns": {"prompt": "q"}})


def test_rows_that_are_no_text_are_left_out_and_counted(tmp_path, caplog):
    broken = pa.array([b"a?", b"\xff", b"b?"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"q": broken, "id": pa.array([1, 2, 3])}), tmp_path / "d.parquet")
    assert texts(load_prompts({"path": str(tmp_path / "d.parquet"), "columns": {"prompt": "q"}})) == ["a?", "b?"]
    assert "1 rows are left out: 1 × q: it is not UTF-8" in caplog.text


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "?"}\n')
    rows = JsonlRows(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match=r"p\.jsonl:1 was changed while it was in use: it must hold a JSON object"):
        rows.row(0, [])
    (tmp_path / "p.jsonl").unlink()
    with pytest.raises(DataError, match=r"p\.jsonl cannot be read: No such file"):
        rows.row(0, [])
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        JsonlRows(tmp_path)


def test_images_are_counted_without_their_bytes(tmp_path):
    """A path without bytes shows, so that it is looked at before anything is sampled."""
    image, path = {"bytes": b"x", "path": None}, {"bytes": None, "path": "a.png"}
    rows = [{"one": image, "many": [image, path]}, {"one": path, "many": []}, {"one": None, "many": None}]
    features = datasets.Features({"one": datasets.Image(), "many": datasets.List(datasets.Image())})
    data = datasets.Dataset(pa.Table.from_pylist(rows, schema=features.arrow_schema))
    found = DatasetRows(data, "d", tmp_path).scan(["one", "many"], ["one", "many"], None)
    assert [row for _, row in found] == [
        {"one": True, "many": [True, {"path": "a.png"}]},
        {"one": {"path": "a.png"}, "many": []},
        {"one": None, "many": []},
    ]


@pytest.mark.parametrize("name", [name for name in READY_MADE])
def test_without_a_hub_it_is_said_how_to_give_a_copy(name):
    with pytest.raises(DataError) as refused:
        load_prompts(name)
    assert "the hub cannot be reached" in str(refused.value)
    assert f"{{source: {name}, path: /my/copy}}" in str(refused.value)
