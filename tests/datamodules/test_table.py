"""Rollout files and data sets to tables: bad lines by name, and the cache."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from rollout_lines import SEEN, USER, draw

from datamodules import table as table_module
from datamodules.table import build_table, find_files
from datamodules.tokenise import Limits
from lenvm_lightning.errors import ChatTemplateError, DataError
from lenvm_lightning.rollouts import prompting

# -- bad lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"messages": [', "it is not JSON: Expecting value (column 15)"),
        (b'{"messages": "\xff"}', "it is not UTF-8: "),
        ({"messages": USER, "completion": "half a pair \ud83d"}, "it holds half of a character"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested too deeply"),
        (b'{"messages": ' + b"1" * 5000 + b"}", "Exceeds the limit (4300 digits)"),
        (b"17", "expected a JSON object, found int"),
        ({"mesages": USER, "completion": "a"}, "neither 'messages' nor 'conversations' among its keys (mesages, "),
        ({"messages": USER, "completion": ""}, "empty completion"),
        ({"messages": USER, "completion": "", "finish_reason": "length"}, "empty completion"),
        ({"messages": USER, "token_ids": []}, "empty completion"),
        (
            {"messages": USER, "token_ids": [5, 2048]},
            "token id 2048 is outside the vocabulary of 2048: the rollouts come from a generator",
        ),
        ({"messages": SEEN, "images": ["no.png"], "completion": "a"}, "image {folder}/no.png does not exist"),
        ({"messages": SEEN, "images": ["text.png"], "completion": "a"}, "image {folder}/text.png cannot be read: "),
        ({"messages": SEEN, "images": ["half.png"], "completion": "a"}, "image {folder}/half.png cannot be read: "),
        (
            {"messages": SEEN, "images": ["big.png"], "completion": "a"},
            "image {folder}/big.png has 200x100 pixels, more than 10,000",
        ),
        ({"messages": SEEN, "images": [], "completion": "a"}, "1 <image> marks in the prompt but 0 images"),
        (  # 20 times 9 + 2 tokens, and 11 around them
            {"messages": [{"role": "user", "content": "<image>" * 20}], "images": ["a.png"] * 20, "completion": "a"},
            "the prompt has 231 tokens with its images, more than max_prompt_length 200",
        ),
        ({"messages": SEEN, "images": ["a.png"], "completion": "<|image_pad|>"}, "an image or video token"),
        ({"messages": [{"role": "user", "content": "<|video_pad|>"}], "completion": "a"}, "an image or video token"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_kept(build, tiny_vl, tmp_path, line, problem):
    draw(tmp_path / "a.png")
    draw(tmp_path / "big.png", (200, 100))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    good = {"messages": SEEN, "images": ["a.png"], "completion": "Three."}
    table = build(tiny_vl, good, b"", line, good, max_prompt_length=200, max_image_pixels=10_000)
    assert [bool(text) for text in table["problem"]] == [False, True, False]
    assert table[1]["problem"].startswith(problem.format(folder=tmp_path))
    assert table["place"] == [f"{tmp_path}/rollouts.jsonl:{number}" for number in (1, 3, 4)]
    assert table[0]["input_ids"] == table[2]["input_ids"]


def test_images_elsewhere_are_bad_rows_unless_they_are_allowed(tiny_vl, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "private").mkdir()
    draw(tmp_path / "private" / "a.png")
    draw(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "link.png").symlink_to("../private/a.png")
    paths = ("a.png", "../private/a.png", "link.png", str(tmp_path / "private" / "a.png"))
    lines = [{"messages": SEEN, "images": [path], "completion": "a"} for path in paths]
    file = tmp_path / "data" / "r.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def problems(**source):
        table, key = build_table(tiny_vl, Limits(), cache_dir=tmp_path / "cache", **source)
        return list(table["problem"]), list(table["place"]), key

    for source in ({"files": [str(file)]}, {"dataset": {"path": "json", "data_files": str(file)}}):
        found, places, key = problems(**source)
        assert found[0] == ""
        for problem in found[1:]:
            assert f" is {tmp_path}/private/a.png, outside of the folder of the data" in problem
            assert "--allow-images-from DIR" in problem
        allowed = problems(**source, allow_images_from=str(tmp_path / "private"))
        assert allowed[:2] == ([""] * 4, places)
        assert allowed[2] != key


def test_a_row_that_the_chat_template_refuses_leaves_the_others(build, tiny_text):
    strict = copy.deepcopy(tiny_text)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict.chat_template = refusal + "{{ messages[0].content }}"
    system = [{"role": "system", "content": "Be brief."}, *USER]
    table = build(strict, {"messages": system, "completion": "a"}, {"messages": USER, "completion": "a"})
    assert table["problem"] == ["the chat template refuses the prompt: no system", ""]


def test_a_chat_template_without_end_ends_the_start(build, tiny_text, monkeypatch):
    monkeypatch.setattr(prompting, "_TEMPLATE_SECONDS", 0.1)
    strange = copy.deepcopy(tiny_text)
    strange.chat_template = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="did not come to an end"):
        build(strange, *[{"messages": USER, "completion": "a"}] * 3)


def test_one_bad_completion_of_a_group_leaves_the_others(build, tiny_text):
    items = [{"completion": "a"}, {"completion": ""}, {"completion": "b"}]
    table = build(tiny_text, {"messages": USER, "completions": items})
    assert table["problem"] == ["", "empty completion", ""]


def test_names_of_files_that_are_no_text_are_said(build, tiny_text, tmp_path):
    build(tiny_text, {"messages": USER, "completion": "a"})
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    (tmp_path / "rollouts.jsonl").rename(strange)
    with pytest.raises(DataError, match=r"names of rollout files that are not UTF-8: '.*\\udcff\.jsonl'\. Rename them"):
        build_table(tiny_text, Limits(), files=[strange], cache_dir=tmp_path / "cache")


def test_no_files_and_no_lines(build, tiny_text, tmp_path):
    with pytest.raises(DataError, match="every line is empty"):
        build(tiny_text, b"", b"  ")
    with pytest.raises(DataError, match=r"no rollout files match '.*/\*\.jsn', 'other' \(looked from "):
        find_files([f"{tmp_path}/*.jsonl", f"{tmp_path}/*.jsn", "other"])
    assert find_files([f"{tmp_path}/*", f"{tmp_path}/rollouts.jsonl"]) == [f"{tmp_path}/rollouts.jsonl"]


# -- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenised(monkeypatch):
    """Count the rollouts that are tokenised."""
    calls = []
    original = table_module.encode_rollout
    monkeypatch.setattr(table_module, "encode_rollout", lambda *args: calls.append(1) or original(*args))
    return calls


def test_a_table_is_made_once(build, tiny_text, tokenised):
    line = {"messages": USER, "completion": "a"}
    first = build(tiny_text, line)
    assert len(tokenised) == 1
    again = build(tiny_text, line)
    assert len(tokenised) == 1
    assert again.to_dict() == first.to_dict()
    build(tiny_text, line, max_length=100)  # other settings
    assert len(tokenised) == 2
    assert build(tiny_text, {"messages": USER, "completion": "b"})["input_ids"] != first["input_ids"]  # other content
    assert len(tokenised) == 3
    build(tiny_text, line)
    assert len(tokenised) == 3


def test_another_tokenizer_makes_another_table(build, tiny_text, tiny_vl, tokenised):
    line = {"messages": USER, "completion": "a"}
    build(tiny_text, line)
    build(tiny_vl, line)
    assert len(tokenised) == 2


def test_a_changed_image_makes_the_table_anew(build, tiny_vl, tmp_path, tokenised):
    line = {"messages": SEEN, "images": ["a.png"], "completion": "a"}
    draw(tmp_path / "a.png")
    small = len(build(tiny_vl, line)[0]["input_ids"])
    build(tiny_vl, line)
    assert len(tokenised) == 1
    draw(tmp_path / "a.png", (112, 112))
    assert len(build(tiny_vl, line)[0]["input_ids"]) == small + 16 - 9  # patches of 28 x 28
    assert len(tokenised) == 2
    (tmp_path / "a.png").unlink()
    assert build(tiny_vl, line)[0]["problem"] == f"image {tmp_path}/a.png does not exist"
    draw(tmp_path / "a.png")
    assert build(tiny_vl, line)[0]["problem"] == ""  # put back


def test_killed_while_a_table_is_replaced(build, tiny_vl, tmp_path, monkeypatch):
    """A table in the cache is whole or not there: it is never deleted in its place."""
    line = {"messages": SEEN, "images": ["a.png"], "completion": "a"}
    draw(tmp_path / "a.png")
    build(tiny_vl, line)
    draw(tmp_path / "a.png", (112, 112))
    rmtree = shutil.rmtree

    def killed_in_the_middle(path, *args, **options):
        if os.path.basename(path).startswith("rollouts-"):
            os.unlink(os.path.join(path, "state.json"))
            raise KeyboardInterrupt
        rmtree(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_in_the_middle)
        with contextlib.suppress(KeyboardInterrupt):
            build(tiny_vl, line)
    assert build(tiny_vl, line)[0]["problem"] == ""


def test_a_cache_that_cannot_be_written(tiny_text, text_rollouts, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"cannot be written to .*file/cache.*cache_dir or \$LENVM_CACHE"):
        build_table(tiny_text, Limits(), files=[str(text_rollouts)], cache_dir=tmp_path / "file" / "cache")


def test_several_processes_give_the_table_of_one(tiny_vl, vision_rollouts, tmp_path):
    tables = [
        build_table(tiny_vl, Limits(), files=[str(vision_rollouts)], cache_dir=tmp_path / str(n), num_proc=n)
        for n in (1, 2)
    ]
    assert tables[0][1] == tables[1][1]
    assert tables[0][0].to_dict() == tables[1][0].to_dict()
    assert len(tables[0][0]) == 40


@pytest.mark.slow
def test_processes_do_not_wait_for_threads_that_no_fork_takes_along(vision_rollouts, tmp_path):
    """The sample stage leaves OpenMP's threads behind; the workers of the fit stage are forked after it, and hung."""
    program = f"""
import torch
from pathlib import Path
from datamodules.table import build_table
from datamodules.tokenise import Limits
from lenvm_lightning.models.processors import load_processor
torch.set_num_threads(4)
torch.rand(2000, 2000) @ torch.rand(2000, 2000)
(torch.rand(4_000_000) * 2).sum()
table, _ = build_table(
    load_processor("tiny-vl"), Limits(), files=["{vision_rollouts}"], cache_dir=Path("{tmp_path}"), num_proc=2
)
print(len(table))
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["40"], done.stderr


# -- datasets -------------------------------------------------------------------------------------------------------


def load(processor, file, folder, kind="json"):
    source = {"path": kind, "data_files": str(file), "cache_dir": str(folder / "hf")}
    return build_table(processor, Limits(), dataset=source, cache_dir=folder / "cache")


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_dataset_gives_the_rows_of_its_file(tiny_vl, vision_rollouts, tmp_path, tokenised, kind):
    expected, _ = build_table(tiny_vl, Limits(), files=[str(vision_rollouts)], cache_dir=tmp_path / "cache")
    file = vision_rollouts
    if kind == "parquet":
        file = vision_rollouts.with_suffix(".parquet")  # beside the images
        table_module.Dataset.from_list([json.loads(x) for x in vision_rollouts.read_text().splitlines()]).to_parquet(
            file
        )
    got, key = load(tiny_vl, file, tmp_path, kind)
    assert got.remove_columns("place").to_dict() == expected.remove_columns("place").to_dict()
    assert got[3]["place"] == f"{kind}[3]"
    assert load(tiny_vl, file, tmp_path, kind)[1] == key
    assert len(tokenised) == 80  # and not once more


@pytest.mark.parametrize(
    ("dataset", "home"),
    [
        ({"path": "json", "data_files": "a/r.jsonl"}, "a"),
        ({"path": "json", "data_files": "r.jsonl"}, "."),
        ({"path": "json", "data_files": {"train": ["a/r.jsonl", "a/s.jsonl"], "test": "a/t.jsonl"}}, "a"),
        ({"path": "json", "data_files": "a/*.jsonl"}, "a"),
        ({"path": "json", "data_dir": "a"}, "a"),
        ({"path": "a"}, "a"),
        ({"path": "./a", "data_files": "b/r.jsonl"}, "./a"),
        ({"path": "json", "data_files": ["a/r.jsonl", "b/r.jsonl"]}, None),  # their parent is nobody's folder
        ({"path": "json", "data_files": "*/r.jsonl"}, None),
        ({"path": "json", "data_files": "https://host/r.jsonl"}, None),
        ({"path": "org/name"}, None),
    ],
)
def test_the_folder_of_a_dataset(here, dataset, home):
    for folder in ("a", "b", "json"):
        (here / folder).mkdir()
    found = table_module._home_of(dataset)
    assert found is None if home is None else str(found) == str(Path(home))


def test_a_dataset_that_changed_is_read_again(tiny_text, tmp_path):
    file = tmp_path / "r.jsonl"
    items = [{"completion": "a", "finish_reason": "length"}, {"completion": "b"}]  # Arrow fills in the absent key
    file.write_text(json.dumps({"messages": USER, "completions": items}) + "\n")
    table, key = load(tiny_text, file, tmp_path)
    assert table["problem"] == ["", ""]
    assert table["censored"] == [True, False]
    file.write_text(json.dumps({"messages": USER, "completion": "c", "images": None}) + "\n")
    os.utime(file, ns=(0, 0))
    table, other = load(tiny_text, file, tmp_path)
    assert other != key
    assert len(table) == 1


def test_nothing_in_a_dataset_is_decoded_but_by_us(tiny_vl, tmp_path, monkeypatch):
    """`datasets` would open images in any format, at any path: EPS starts Ghostscript."""
    program, started = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n"
    text = table_module.Value("string")
    features = table_module.Features(
        {"messages": [{"role": text, "content": text}], "images": [datasets.Image()], "completion": text}
    )
    row = {"messages": SEEN, "images": [{"bytes": eps, "path": None}], "completion": "a"}
    table_module.Dataset.from_list([row], features=features).to_parquet(tmp_path / "r.parquet")
    table, _ = load(tiny_vl, tmp_path / "r.parquet", tmp_path, "parquet")
    assert table["problem"] == ["images is not a list of paths"]
    assert not started.exists()


def test_a_row_of_a_dataset_that_is_no_text_leaves_the_others(tiny_text, tmp_path):
    broken = pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"messages": pa.array([USER] * 3), "completion": broken}), tmp_path / "r.parquet")
    table, _ = load(tiny_text, tmp_path / "r.parquet", tmp_path, "parquet")
    assert table["problem"] == ["", "completion: it is not UTF-8: invalid start byte at byte 0", ""]


def test_a_dataset_that_cannot_be_loaded(tiny_text, tmp_path):
    (tmp_path / "broken.json").write_text('{"messages": [')
    for name in ("broken.json", "absent.json"):
        with pytest.raises(DataError, match=f"(?s)datasets.load_dataset.*{name}.* failed: "):
            load(tiny_text, tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"splitt": "train"}, "failed: .*splitt"),
        ({"split": None}, "gives DatasetDict: name one split"),
        ({"streaming": True}, "gives IterableDataset: name one split, and do not stream it"),
    ],
)
def test_arguments_of_a_dataset_that_cannot_be(tiny_text, text_rollouts, tmp_path, wrong, words):
    dataset = {"path": "json", "data_files": str(text_rollouts), **wrong}
    with pytest.raises(DataError, match=f"(?s)datasets.load_dataset.* {words}"):
        build_table(tiny_text, Limits(), dataset=dataset, cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"failed: .*path"):
        build_table(tiny_text, Limits(), dataset={"pat": "json"}, cache_dir=tmp_path)
