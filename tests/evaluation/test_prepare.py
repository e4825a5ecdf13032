"""What an evaluation would do, before any model is loaded: protocols of data sources, systems, sampling, identity."""

import json

import datasets
import pytest
from PIL import Image

from lenvm_lightning.errors import DataError, EvaluationError
from lenvm_lightning.evaluation.plots import as_png, new_figure
from lenvm_lightning.evaluation.prepare import identity_of, name_of_folder, prepare
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.evaluation.settings import filled


def prepared(task, **given):
    return prepare(read_settings({"task": task, **given}, "test"))


def names(found):
    return [system.name for system in found.systems]


def test_protocols_belong_to_data_sources(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    tiny, paper = prepared("gsm8k"), prepared("gsm8k", data=str(file))
    assert (tiny.source.name, tiny.settings.n, tiny.settings.limit, tiny.sampling.max_tokens) == ("tiny", 8, 50, 768)
    assert (paper.source.name, paper.settings.n, paper.settings.limit, paper.sampling.max_tokens) == (
        "paper", 64, None, 4096,
    )  # fmt: skip
    assert (names(tiny), names(paper)) == (["base", "tilt:-5"], ["base", "tilt:-20"])
    compared = prepared("gsm8k", data=str(file), compare=True)
    assert names(compared) == ["base", "base+min-p", "tilt:-20", "tilt:-50", "tilt:-100", "tilt:-1000"]
    assert paper.tiny_world  # its generator is


def test_what_is_given_wins():
    found = prepared("lifebench", lengths=[16], n=3, temperature=0.7, limit=2)
    assert (found.settings.own.lengths, found.settings.n, found.sampling.temperature) == ([16], 3, 0.7)
    assert found.sampling.max_tokens == 48  # three times the longest target length
    assert found.settings.own.constraints == ["equal to", "at most", "at least"]
    settings = read_settings({"task": "lifebench", "n": 3}, "test")
    assert filled(settings, {"n": 1, "soften": True, "lengths": [8]}).as_dict()["lengths"] == [8]
    assert filled(settings, {"n": 1}).n == 3


def test_given_sampling_holds_for_all_systems():
    _, guided = prepared("gsm8k", limit=1).systems
    assert guided.sampling == {"min_p": 0.01}
    _, guided = prepared("gsm8k", limit=1, min_p=0.0).systems
    assert guided.sampling == {}


def test_who_guides():
    server = {"generator": "http://127.0.0.1:9", "data": "tiny"}
    assert names(prepared("lifebench", **server)) == ["base"]
    for task in ("lifebench", "longbench-write"):  # the research server knows the paper's controls alone
        assert names(prepared(task, **server, options={"server": "research"})) == ["base", "paper"]
    assert names(prepared("gsm8k", **server, options={"server": "research"})) == ["base", "tilt:-5"]
    with pytest.raises(EvaluationError, match="ours: a server decodes by itself"):
        prepared("lifebench", **server, systems=["ours"])


def test_the_folder_is_named_by_all_that_decides():
    def name(**given):
        return name_of_folder("lifebench", identity_of(prepared("lifebench", limit=1, **given), None))

    assert name() == name(data="tiny") == name(out="elsewhere", device="cpu", allow_images_from=".")
    assert len({name(), name(lengths=[16]), name(seed=1), name(soften=True), name(dtype="bfloat16")}) == 5
    assert name().startswith("lifebench-tiny-text-")


def test_a_file_of_images_that_is_no_jsonl(here):
    row = {
        "id": "4",
        "question": "Which?\n<image1>",
        "options": ["4"],
        "answer": "A",
        "level": 3,
        "subject": "counting",
    }
    content = {"bytes": as_png(new_figure()[0]), "path": None}
    file = here / "mathvision.parquet"
    datasets.Dataset.from_list([{**row, "decoded_image": content}]).to_parquet(file)
    given = prepare(read_settings({"task": "vqa", "data": {"source": "mathvision", "path": str(file)}}, "test"))
    named = prepare(read_settings({"task": "vqa", "data": str(file)}, "test"))
    assert len(given.questions.prompts) == len(named.questions.prompts) == 1


@pytest.mark.parametrize("task", ["vqa", "length"])
def test_images_elsewhere_need_a_setting(here, task):
    (here / "data").mkdir()
    Image.new("RGB", (28, 28)).save(here / "a.png")
    row = {
        "id": "4",
        "question": "Which?",
        "answer": "A",
        "image": "../a.png",
        "level": 3,
        "subject": "s",
        "options": [],
    }
    file = here / "data" / "p.jsonl"
    file.write_text(json.dumps(row if task == "vqa" else {"prompt": "<image>?", "image": "../a.png"}) + "\n")
    given = {"task": task, "data": str(file), "generator": "tiny-vl", "max_tokens": 8}
    with pytest.raises(DataError, match=r"p\.jsonl:1: image \.\./a\.png is .*outside of the folder of the data"):
        prepare(read_settings(given, "test"))
    assert len(prepare(read_settings({**given, "allow_images_from": ["."]}, "test")).questions.prompts) == 1
