"""Prompts of one source: embedded sets, JSONL files and data sets."""

import io
import os

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from prompt_rows import ROWS, as_parquet, make_image, texts
from pyarrow import parquet

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.prompts import load_prompts

# -- embedded sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-math", "tiny-write", "tiny-vqa"])
def test_embedded_sets_come_by_name(name):
    prompts = load_prompts(name, limit=20)
    assert len(prompts) == len(prompts.ids) == len(set(prompts.ids)) == 20
    assert [prompt.prompt_id for prompt in prompts] == prompts.ids
    assert all(prompt.split in ("train", "test") for prompt in prompts)
    assert len(prompts[0].images) == (name == "tiny-vqa")
    assert load_prompts(name, limit=20).description == prompts.description
    assert load_prompts(name, limit=20, seed=1).description["digest"] != prompts.description["digest"]
    held_out = load_prompts({"source": name, "split": "test", "limit": 3})
    assert [prompt.split for prompt in held_out] == ["test"] * 3


def test_an_embedded_set_has_600_prompts_unless_more_are_wanted():
    assert len(load_prompts("tiny-math")) == 600
    assert len(load_prompts("tiny-math", limit=700)) == 700


# -- JSONL ------------------------------------------------------------------------------------------------------------


def test_all_broken_lines_are_listed_with_their_place(write, tmp_path):
    file = write(
        "bad.jsonl",
        {"prompt": "fine"},
        '{"prompt": "torn',
        "",
        {"promt": "?"},
        {"prompt": "a", "messages": []},
        {"prompt": "look", "images": ["gone.png"]},
        {"prompt": "<image><image>", "image": "gone.png"},
        {"prompt": "?", "split": "dunno"},
        {"prompt": "?", "imges": ["a.png"]},
        [1],
        {"messages": [{"role": "robot", "content": "?"}]},
        {"prompt": "one", "id": 1},
        {"prompt": "other", "id": 1},
        {"prompt": "  "},
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": "?", "meta": ' + "1" * 5000 + "}",
        '{"prompt": "?", "id": "\\ud83d"}',
    )
    with pytest.raises(DataError) as refused:
        load_prompts(file)
    text = str(refused.value)
    assert text.startswith(f"14 rows of {file} cannot be used:")
    for line, said in {
        2: "it is not JSON: Unterminated string starting at (column 12)",
        4: "none of 'messages', 'conversations' and 'prompt' among its keys (promt); did you mean 'prompt'?",
        5: "both messages and prompt",
        6: "image gone.png cannot be read: No such file",
        7: "2 <image> marks in the prompt but 1 images",
        8: "split is 'dunno', expected train or test",
        9: "unknown key 'imges'; did you mean 'images'?",
        10: "it must hold a JSON object, found a list",
        11: "unknown role 'robot'",
        13: "another prompt has the id 'bad/1' too",
        14: "prompt is empty",
        15: "it is nested too deeply",
        16: "Exceeds the limit (4300 digits)",
        17: "it holds half of a character",
    }.items():
        assert f"{file}:{line}: " in text
        assert said in text.partition(f"{file}:{line}: ")[2].partition("\n")[0]


def test_globs_take_their_files_in_order(write, tmp_path):
    write("b.jsonl", {"prompt": "b", "id": 1})
    write("a.jsonl", {"prompt": "a", "id": 1})
    assert load_prompts(str(tmp_path / "*.jsonl")).ids == ["a/1", "b/1"]
    with pytest.raises(DataError, match=r"no file matches .*none-\*"):
        load_prompts(str(tmp_path / "none-*.jsonl"))


def test_names_of_files_that_are_no_text_and_ids_that_are_lists(write, tmp_path):
    os.rename(write("a.jsonl", {"q": "a", "i": [1]}, {"q": "b", "i": [1]}), os.fsencode(tmp_path) + b"/\xff.jsonl")
    source = {"path": str(tmp_path / "*.jsonl"), "columns": {"prompt": "q", "id": "i"}, "unique": True}
    assert load_prompts(source).ids == ["\N{REPLACEMENT CHARACTER}/[1]"]


def test_rows_of_a_split(write):
    file = write("s.jsonl", *[{"prompt": str(i), "split": "test" if i % 3 == 0 else "train"} for i in range(9)])
    assert texts(load_prompts(file, split="test")) == ["0", "3", "6"]
    assert texts(load_prompts({"path": file, "split": "train"}, limit=2)) == ["1", "2"]
    silent = write("t.jsonl", {"prompt": "?"})
    with pytest.raises(DataError, match=r"no row of .* says which split"):
        load_prompts(silent, split="test")
    with pytest.raises(DataError, match="must be train or test"):
        load_prompts(file, split="testmini")


@pytest.fixture
def private(tmp_path):
    """An image that the data in the folder beside it has no business with."""
    for folder in ("data", "private"):
        (tmp_path / folder).mkdir()
        make_image().save(tmp_path / folder / "a.png")
    (tmp_path / "data" / "link.png").symlink_to("../private/a.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    return tmp_path / "private"


def test_images_elsewhere_are_named_with_file_and_line_unless_they_are_allowed(write, private):
    paths = ("a.png", "../private/a.png", "link.png", str(private / "a.png"))
    file = write("data/p.jsonl", *[{"prompt": f"<image>{path}", "image": path} for path in paths])
    with pytest.raises(DataError) as refused:
        load_prompts(file)
    assert str(refused.value).startswith(f"3 rows of {file} cannot be used:")
    for line, path in enumerate(paths[1:], 2):
        assert f"{file}:{line}: image {path} is {private}/a.png, outside of the folder of the data" in str(
            refused.value
        )
    assert str(refused.value).count("--allow-images-from DIR") == 3
    prompts = load_prompts(file, allow_images_from=str(private))
    # What is opened later is what was looked at, whatever becomes of links.
    assert [prompt.images for prompt in prompts] == [(f"{private.parent}/data/a.png",), *[(f"{private}/a.png",)] * 3]
    with pytest.raises(DataError, match="allow_images_from: gone is no folder"):
        load_prompts(file, allow_images_from=["gone"])


def test_pipes_are_no_images(write, private):
    file = write("data/p.jsonl", {"prompt": "?", "image": "pipe.png"})
    with pytest.raises(DataError, match=r"p\.jsonl:1: image pipe\.png cannot be read: it is no regular file"):
        load_prompts(file)


# -- data sets --------------------------------------------------------------------------------------------------------


def test_rows_without_ids_are_numbered_by_split(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": f"{i}"} for i in range(3)])
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "mine")
    prompts = load_prompts(str(tmp_path / "mine"))
    assert prompts.ids == [f"mine/{split}-{i}" for split in ("train", "validation") for i in range(3)]
    assert [prompt.split for prompt in prompts] == ["train"] * 3 + ["test"] * 3
    assert load_prompts(str(tmp_path / "mine"), split="test").ids == prompts.ids[3:]
    assert load_prompts({"path": str(tmp_path / "mine"), "split": "train"}).ids == prompts.ids[:3]
    with pytest.raises(
        DataError, match=r"no split 'validatoin'; did you mean 'validation'\? \(it has train, validation"
    ):
        load_prompts({"path": str(tmp_path / "mine"), "split": "validatoin"})


def test_images_are_opened_when_a_prompt_is_taken(tmp_path):
    """The broken ones are not among those that the digest looks at."""
    content = (tmp_path / "p.png", tmp_path / "q.png")
    make_image("red").save(content[0])
    make_image("blue").save(content[1])
    good = [{"bytes": path.read_bytes(), "path": None} for path in content]
    rows = [{"q": f"{i}?", "pics": good[: i % 3]} for i in range(200)]
    rows[4]["pics"] = [{"bytes": b"nothing", "path": None}]
    features = datasets.Features({"q": datasets.Value("string"), "pics": datasets.List(datasets.Image())})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d.parquet")
    prompts = load_prompts({"path": str(tmp_path / "d.parquet"), "columns": {"prompt": "q", "image": "pics"}})
    assert texts(prompts[:4]) == ["0?", "<image>1?", "<image><image>2?", "3?"]
    assert [image.getpixel((0, 0)) for image in prompts[2].images] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(DataError, match=r"row 4 of split 'train' .*image cannot be read"):
        prompts[4]


def test_bytes_of_images_are_opened_as_files_are(tmp_path):
    large, eps = io.BytesIO(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n"
    Image.new("1", (9000, 9000)).save(large, "PNG")
    rows = [{"q": "?", "pic": {"bytes": content, "path": "a.png"}} for content in (large.getvalue(), eps)]
    features = datasets.Features({"q": datasets.Value("string"), "pic": datasets.Image()})
    for row, words in zip(rows, ("9000x9000 pixels, more than 50,000,000", "no image of a known format"), strict=True):
        datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "d.parquet")
        with pytest.raises(DataError, match=f"row 0 of split 'train' .*d.parquet: image .*{words}"):
            load_prompts({"path": str(tmp_path / "d.parquet"), "columns": {"prompt": "q", "image": "pic"}})


@pytest.mark.parametrize("kind", ["text", "struct", "image"])
def test_paths_in_data_sets_are_opened_in_their_folder_alone(private, kind):
    text, content = datasets.Value("string"), datasets.Value("binary")
    feature = {"text": text, "struct": {"bytes": content, "path": text}, "image": datasets.Image()}[kind]
    file = private.parent / "data" / "d.parquet"

    def load(path, **options):
        image = path if kind == "text" else {"bytes": None, "path": path}
        features = datasets.Features({"q": text, "pic": feature})
        # `datasets` itself would put the file in place of its path.
        parquet.write_table(pa.Table.from_pylist([{"q": "?", "pic": image}], schema=features.arrow_schema), file)
        [image] = load_prompts({"path": str(file), "columns": {"prompt": "q", "image": "pic"}}, **options)[0].images
        return Image.open(image).size if isinstance(image, str) else image.size

    assert load("a.png") == (6, 4)
    for path in (str(private / "a.png"), "../private/a.png", "link.png"):
        with pytest.raises(DataError, match=r"outside of the folder of the data.*--allow-images-from DIR"):
            load(path)
        assert load(path, allow_images_from=[str(private)]) == (6, 4)


def test_rows_without_a_question_are_left_out_and_counted(tmp_path, caplog):
    datasets.Dataset.from_list([{"q": "a"}, {"q": None}, {"q": " "}, {"q": "b"}]).to_parquet(tmp_path / "d.parquet")
    source = {"path": str(tmp_path / "d.parquet"), "columns": {"prompt": "q"}}
    assert load_prompts(source).ids == ["d/train-0", "d/train-3"]
    assert "2 rows are left out: 2 × q is empty" in caplog.text
    datasets.Dataset.from_list([{"q": ""}]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"no row of .* can be used: 1 × q is empty"):
        load_prompts(source)


def test_a_data_set_without_a_known_column_says_what_it_has(tmp_path):
    as_parquet(tmp_path)
    with pytest.raises(DataError, match=r"no column of prompts.*columns: \{prompt: \.\.\.\}.*it has text, key, kind"):
        load_prompts(str(tmp_path))
    with pytest.raises(
        DataError, match=r"no column 'texts'; did you mean 'text'.*no column 'keys'.*it has text, key, kind"
    ):
        load_prompts({"path": str(tmp_path), "columns": {"prompt": "texts", "id": "keys"}})


def test_ids_that_repeat_are_refused_unless_the_first_is_meant(tmp_path):
    rows = [{"q": "a", "id": 1}, {"q": "b", "id": 1}, {"q": "c", "id": 2}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    source = {"path": str(tmp_path / "d.parquet"), "columns": {"prompt": "q", "id": "id"}}
    with pytest.raises(DataError, match=r"row 1 of .*: another prompt has the id 'd/1' too"):
        load_prompts(source)
    assert texts(load_prompts({**source, "unique": True})) == ["a", "c"]


# -- several, and all -------------------------------------------------------------------------------------------------


def test_the_digest_follows_the_content(write, tmp_path):
    def digest(*rows, **options):
        return load_prompts({"path": write("d.jsonl", *rows), **options}).description["digest"]

    make_image().save(tmp_path / "p.png")
    row = {"prompt": "<image>?", "id": 1, "image": "p.png"}
    first = digest(row)
    assert digest(row, {"prompt": "?"}, limit=1) == first  # what is not taken does not count
    assert digest({**row, "ignored": 1}) == first
    assert len({first, digest({**row, "prompt": "<image>!"}), digest({**row, "id": 2}), digest({**row, "meta": {"a": 1}})}) == 4  # fmt: skip # noqa: E501
    make_image("green", (60, 40)).save(tmp_path / "p.png")
    assert digest(row) != first


def test_shuffling_is_drawn_with_the_seed(tmp_path):
    as_parquet(tmp_path)
    source = {"path": str(tmp_path), "columns": {"prompt": "text"}, "shuffle": True}
    orders = [texts(load_prompts(source, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [row["text"] for row in ROWS]
    assert texts(load_prompts(source, limit=2)) == orders[0][:2]
