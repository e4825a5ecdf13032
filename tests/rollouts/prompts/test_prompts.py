"""Prompts from files, folders and data sets; the paper's sources in tiny copies with their own columns."""

import json
from datetime import datetime
from pathlib import Path

import datasets
import places
import pytest
from PIL import Image

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.prompts.mapping import fill, read_turns
from lenvm_lightning.rollouts.prompts.sources import READY_MADE
from lenvm_lightning.rollouts.record import parse_record

SHARED = places.SHARED / "data"
ASKED = "Please reason step by step, and put your final answer within \\boxed{}.\n\n"
shared = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.exists(), reason="the real data is not beside this checkout"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def write(tmp_path):
    def write_lines(name, *rows):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return str(file)

    return write_lines


def texts(prompts):
    return [prompt.messages[-1]["content"] for prompt in prompts]


def make_image(color="red", size=(6, 4)):
    return Image.new("RGB", size, color)


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


def test_rows_say_themselves_what_they_hold(write, tmp_path):
    make_image().save(tmp_path / "p.png")
    file = write(
        "mine.jsonl",
        {"prompt": "Why?", "id": 7, "meta": {"gold": 4}, "split": "train", "difficulty": "hard"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}], "id": "x"},
        {
            "conversations": [
                {"from": "human", "value": "Where? <image>"}, {"from": "gpt", "value": "Here."},
                {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}, {"from": "gpt", "value": "No."},
            ],
            "images": ["p.png"],
            "meta_info": {"lenvm_idx": 3, "dataset_name": "places", "split": "test"},
        },
        {"prompt": "What is this?", "image": "p.png"},
    )  # fmt: skip
    prompts = load_prompts(file)
    assert prompts.ids[:3] == ["mine/7", "mine/x", "mine/places/3"]
    first, second, third, last = prompts
    assert (first.messages, first.meta, first.split) == ([{"role": "user", "content": "Why?"}], {"gold": 4}, "train")
    assert [message["role"] for message in second.messages] == ["system", "user"]
    assert [message["content"] for message in third.messages] == ["Where? <image>", "Here.", "Sure?"]
    assert third.images == (str(tmp_path / "p.png"),)
    assert third.split == "test"
    assert last.messages[0]["content"] == "<image>What is this?"
    assert (last.images, last.split) == (third.images, None)


def test_completions_of_one_prompt_are_one_prompt(write):
    row = {"prompt_id": "a", "messages": [{"role": "user", "content": "?"}]}
    file = write("r.jsonl", *[{**row, "number": i, "completion": f"{i}", "token_ids": [i]} for i in range(4)])
    assert load_prompts(file).ids == ["r/a"]
    file = write("r.jsonl", *[{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": str(i)}]} for i in range(4)])  # fmt: skip # noqa: E501
    assert len(load_prompts(file)) == 1


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
    )
    with pytest.raises(DataError) as refused:
        load_prompts(file)
    text = str(refused.value)
    assert text.startswith(f"11 rows of {file} cannot be used:")
    for line, said in {
        2: "broken JSON at column",
        4: "none of 'messages', 'conversations' and 'prompt' among its keys (promt); did you mean 'prompt'?",
        5: "both messages and prompt",
        6: "image gone.png cannot be read: No such file",
        7: "2 <image> marks in the prompt but 1 images",
        8: "split is 'dunno', expected train or test",
        9: "unknown key 'imges'; did you mean 'images'?",
        10: "expected a JSON object, found list",
        11: "unknown role 'robot'",
        13: "another prompt has the id 'bad/1' too",
        14: "prompt is empty",
    }.items():
        assert f"{file}:{line}: " in text
        assert said in text.partition(f"{file}:{line}: ")[2].partition("\n")[0]


def test_columns_of_files_can_be_named(write, tmp_path):
    make_image().save(tmp_path / "p.png")
    row = {"q": "How many?", "opts": ["one", "two"], "pic": "p.png", "nr": 5, "gold": "A", "level": 2, "part": "val"}
    columns = {"prompt": "q", "options": "opts", "image": "pic", "id": "nr", "split": "part", "meta": ["gold", "level"]}
    file = write("m.jsonl", row)
    (prompt,) = load_prompts({"path": file, "columns": columns, "template": "Level {level}, \\boxed{}: {prompt}"})
    assert prompt.messages == [
        {"role": "user", "content": "<image>Level 2, \\boxed{}: How many?\nChoices:\n(A) one\n(B) two"}
    ]
    assert (prompt.prompt_id, prompt.split, prompt.meta) == ("m/5", "test", {"gold": "A", "level": 2})
    with pytest.raises(DataError, match=r"no column 'opt'; did you mean 'opts'\? \(it has q, opts"):
        load_prompts({"path": file, "columns": {"prompt": "opt"}})
    with pytest.raises(DataError, match=r"no column 'levle'; did you mean 'level'"):
        load_prompts({"path": file, "columns": columns, "template": "{levle} {prompt}"})


def test_globs_take_their_files_in_order(write, tmp_path):
    write("b.jsonl", {"prompt": "b", "id": 1})
    write("a.jsonl", {"prompt": "a", "id": 1})
    assert load_prompts(str(tmp_path / "*.jsonl")).ids == ["a/1", "b/1"]
    with pytest.raises(DataError, match=r"no file matches .*none-\*"):
        load_prompts(str(tmp_path / "none-*.jsonl"))


def test_rows_of_a_split(write):
    file = write("s.jsonl", *[{"prompt": str(i), "split": "test" if i % 3 == 0 else "train"} for i in range(9)])
    assert texts(load_prompts(file, split="test")) == ["0", "3", "6"]
    assert texts(load_prompts({"path": file, "split": "train"}, limit=2)) == ["1", "2"]
    silent = write("t.jsonl", {"prompt": "?"})
    with pytest.raises(DataError, match=r"no row of .* says which split"):
        load_prompts(silent, split="test")
    with pytest.raises(DataError, match="must be train or test"):
        load_prompts(file, split="testmini")


def test_a_mark_without_an_image_is_only_a_word(write):
    """Or the record of such a prompt could not be read again."""
    (prompt,) = load_prompts(write("w.jsonl", {"prompt": "What does <image> mean in SVG?"}))
    assert prompt.messages[0]["content"] == "What does < image> mean in SVG?"
    record = {"prompt_id": prompt.prompt_id, "messages": prompt.messages, "completion": "An image."}
    assert len(parse_record(record, Path())[0]) == 1


# -- data sets --------------------------------------------------------------------------------------------------------

ROWS = [{"text": f"Question {i}", "key": f"k{i}", "kind": i % 2} for i in range(6)]


def as_parquet(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    return folder


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


def test_the_test_questions_of_mathvista_are_those_with_answers(tmp_path):
    """Its split called `test` keeps its answers secret."""
    row = {name: "" for name in ("unit", "precision", "question_type", "answer_type")}
    row |= {"question": "How many?", "choices": ["1", "2"], "decoded_image": "a.png"}
    splits = {"test": {**row, "pid": "9", "answer": ""}, "testmini": {**row, "pid": "1", "answer": "2"}}
    (tmp_path / "copy").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "copy" / "a.png")
    datasets.DatasetDict({name: datasets.Dataset.from_list([one]) for name, one in splits.items()}).save_to_disk(
        tmp_path / "copy"
    )
    source = {"source": "mathvista", "path": str(tmp_path / "copy")}
    assert load_prompts(source, split="test").ids == ["mathvista/1"]
    assert load_prompts({**source, "split": "test"}).ids == ["mathvista/9"]


def test_class_labels_and_times_are_remembered_as_words(tmp_path):
    sort, at = datasets.ClassLabel(names=["easy", "hard"]), datasets.Value("timestamp[s]")
    features = datasets.Features({"prompt": datasets.Value("string"), "sort": sort, "at": at})
    row = {"prompt": "?", "sort": 1, "at": datetime(2026, 1, 2)}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "d")
    source = {"path": str(tmp_path / "d"), "columns": {"prompt": "prompt", "meta": ["sort", "at"]}}
    assert load_prompts(source)[0].meta == {"sort": "hard", "at": "2026-01-02 00:00:00"}


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


@pytest.mark.parametrize("name", [name for name in READY_MADE])
def test_without_a_hub_it_is_said_how_to_give_a_copy(name):
    with pytest.raises(DataError) as refused:
        load_prompts(name)
    assert "the hub cannot be reached" in str(refused.value)
    assert f"{{source: {name}, path: /my/copy}}" in str(refused.value)


# -- the paper's sources ----------------------------------------------------------------------------------------------


def deepmath(folder):
    row = {"question": "Evaluate $x^{2}$ at 2.", "final_answer": "4", "difficulty": 4.5, "topic": "Calculus"}
    return [{**row, **{f"r1_solution_{i}": "..." for i in (1, 2, 3)}}], None, "train"


def wildchat(folder):
    turn = {"language": "English", "redacted": False, "toxic": False, "turn_identifier": 1}
    conversation = [
        {"content": "Tell me a <image> joke", "role": "user", **turn},
        {"content": "Knock knock", "role": "assistant", **turn},
        {"content": "Who is there?", "role": "user", **turn},
        {"content": "Me", "role": "assistant", **turn},
    ]
    row = {"conversation_hash": "abc", "model": "gpt-4", "conversation": conversation, "turn": 2, "language": "English"}
    return [row, row], None, "train"  # the same conversation twice: its hash is that of the content


def gsm8k(folder):
    return [{"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 1,004"}], None, "test"


def math500(folder):
    row = {"problem": "Solve.", "solution": "...", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 2}
    return [{**row, "unique_id": "test/algebra/1.json"}], None, "test"


def mathvista(folder):
    row = {
        "pid": "1", "question": "How far?", "image": "images/1.jpg", "decoded_image": make_image(),
        "choices": ["1", "2"], "unit": "cm", "precision": None, "answer": "2",
        "question_type": "multi_choice", "answer_type": "text",
        "metadata": {"grade": "high school"}, "query": "Hint: ...",
    }  # fmt: skip
    features = {name: datasets.Value("string") for name in row} | {
        "decoded_image": datasets.Image(), "choices": datasets.List(datasets.Value("string")),
        "precision": datasets.Value("float64"), "metadata": {"grade": datasets.Value("string")},
    }  # fmt: skip
    return [row, {**row, "pid": "2", "choices": None, "unit": None}], datasets.Features(features), "testmini"


def mathvision(folder):
    row = {
        "id": "4", "question": "Which?\n<image1>", "options": ["A", "B"], "image": "images/4.jpg",
        "decoded_image": make_image("blue"), "answer": "B", "solution": None, "level": 3, "subject": "counting",
    }  # fmt: skip
    features = {name: datasets.Value("string") for name in row} | {
        "decoded_image": datasets.Image(), "options": datasets.List(datasets.Value("string")),
        "level": datasets.Value("int64"),
    }  # fmt: skip
    return [row], datasets.Features(features), "test"


MATHVISTA = {"answer": "2", "question_type": "multi_choice", "answer_type": "text"}
EXPECTED = {
    deepmath: [
        ("train-0", ASKED + "Evaluate $x^{2}$ at 2.", {"answer": "4", "difficulty": 4.5, "topic": "Calculus"}, "train")
    ],
    wildchat: [("abc", "Tell me a < image> joke", {"language": "English"}, "train")],
    gsm8k: [("test-0", ASKED + "2+2?", {"answer": "1,004"}, "test")],
    math500: [
        ("test/algebra/1.json", ASKED + "Solve.", {"answer": "\\frac{1}{2}", "subject": "Algebra", "level": 2}, "test")
    ],
    mathvista: [
        (
            "1",
            "<image>" + ASKED + "How far? (Unit: cm)\nChoices:\n(A) 1\n(B) 2",
            {"choices": ["1", "2"], "unit": "cm", **MATHVISTA},
            "test",
        ),
        ("2", "<image>" + ASKED + "How far?", MATHVISTA, "test"),
    ],
    mathvision: [
        (
            "4",
            "<image>" + ASKED + "Which?\nChoices:\n(A) A\n(B) B",
            {"answer": "B", "options": ["A", "B"], "level": 3, "subject": "counting"},
            "test",
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("source", EXPECTED, ids=lambda source: source.__name__)
def test_the_papers_sources_in_their_own_columns(source, tmp_path):
    rows, features, split = source(tmp_path)
    data = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({split: data}).save_to_disk(tmp_path / "copy")
    prompts = load_prompts({"source": source.__name__, "path": str(tmp_path / "copy")})
    expected = EXPECTED[source]
    assert prompts.ids == [f"{source.__name__}/{prompt_id}" for prompt_id, *_ in expected]
    assert texts(prompts) == [text for _, text, *_ in expected]
    assert [prompt.meta for prompt in prompts] == [meta for *_, meta, _ in expected]
    assert [prompt.split for prompt in prompts] == [role for *_, role in expected]
    assert all(len(prompt.images) == prompt.messages[-1]["content"].count("<image>") for prompt in prompts)


def test_code_questions_are_looked_up_where_they_are(tmp_path):
    def save(name, split, *rows):
        datasets.DatasetDict({split: datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    example = {"input": "1 2", "output": "3"}
    copies = {
        "taco": save("taco", "train", {"question": "no"}, {"question": "Sort it."}),
        "code_contests": save("contests", "test", {"description": "Add them."}),
        "open-r1/codeforces": save(
            "forces", "train",
            {"description": "Sum.", "input_format": "Two.", "output_format": "One.", "examples": [example], "note": ""},
        ),
    }  # fmt: skip
    row = {"question": "-", "difficulty": "EASY", "r1_generation": "...", "judgement": "right"}
    rows = [
        {**row, "id": "1", "question_id": "a", "dataset": "taco", "split": "train", "index": "1"},
        {**row, "id": "2", "question_id": "a", "dataset": "taco", "split": "train", "index": "1"},
        {**row, "id": "3", "question_id": "b", "dataset": "code_contests", "split": "test", "index": "0"},
        {**row, "id": "4", "question_id": "c", "dataset": "open-r1/codeforces", "split": "train", "index": "0"},
        {**row, "id": "5", "question_id": "d", "dataset": "taco", "split": "train", "index": "99"},
        {**row, "id": "6", "question_id": "e", "dataset": "apps", "split": "train", "index": "0", "question": "Here."},
    ]
    source = {"source": "opencodereasoning", "path": save("ocr", "python", *rows), "questions": copies}
    prompts = load_prompts(source)
    assert prompts.ids == [f"opencodereasoning/{key}" for key in "abce"]
    codeforces = "Sum.\n\nInput\n\nTwo.\n\nOutput\n\nOne.\n\nExamples\n\nInput\n\n1 2\n\nOutput\n\n3"
    assert texts(prompts) == ["Sort it.", "Add them.", codeforces, "Here."]
    assert prompts[0].meta == {"dataset": "taco", "split": "train", "index": "1", "difficulty": "EASY"}
    del source["questions"]["taco"]
    with pytest.raises(DataError, match=r"'BAAI/TACO' is not on this machine.*\n.*questions: \{taco: /my/copy\}"):
        load_prompts(source)


def test_a_copy_with_other_columns_is_refused_and_can_be_mapped(tmp_path):
    datasets.Dataset.from_list([{"questoin": "?", "answer": "#### 1"}]).to_parquet(tmp_path / "train.parquet")
    source = {"source": "gsm8k", "path": str(tmp_path)}
    with pytest.raises(DataError, match=r"gsm8k, read from .*: no column 'question'; did you mean 'questoin'"):
        load_prompts(source)
    prompts = load_prompts({**source, "columns": {"prompt": "questoin"}, "template": "{prompt} Answer only."})
    assert texts(prompts) == ["? Answer only."]


class TestRealData:
    pytestmark = shared

    def test_gsm8k(self):
        test = load_prompts({"source": "gsm8k", "path": str(SHARED / "gsm8k")}, split="test")
        assert (len(test), test.ids[0], test[0].split) == (1319, "gsm8k/test-0", "test")
        assert test[0].meta == {"answer": "18"}
        assert test[0].messages[0]["content"].startswith(ASKED + "Janet’s ducks lay 16 eggs")
        lines = load_prompts({"source": "gsm8k", "path": str(SHARED / "gsm8k" / "test.jsonl")})
        assert (lines.ids, texts(lines)) == (test.ids, texts(test))
        assert len(load_prompts({"source": "gsm8k", "path": str(SHARED / "gsm8k")})) == 1319 + 7473

    def test_mathvision(self):
        prompts = load_prompts({"source": "mathvision", "path": str(SHARED / "mathvision" / "problems.jsonl")})
        assert len(prompts) == 900
        for prompt in prompts[:50]:
            assert prompt.messages[0]["content"].startswith("<image>" + ASKED)
            assert prompt.messages[0]["content"].count("<image") == 1
            with Image.open(prompt.images[0]) as image:
                assert max(image.size) <= 336


# -- several, and all -------------------------------------------------------------------------------------------------


def test_sources_follow_each_other_each_with_its_limit(write):
    file = write("f.jsonl", *[{"prompt": str(i), "id": i} for i in range(5)])
    prompts = load_prompts(["tiny-math", {"path": file, "limit": 3}, {"source": "tiny-write", "seed": 4}], limit=2)
    assert [prompt_id.split("/")[0] for prompt_id in prompts.ids] == ["tiny-math"] * 2 + ["f"] * 3 + ["tiny-write"] * 2
    assert [prompt.prompt_id for prompt in prompts] == prompts.ids
    assert prompts[-1].prompt_id == prompts.ids[-1]
    assert [prompt.prompt_id for prompt in prompts[1:4]] == prompts.ids[1:4]
    with pytest.raises(IndexError):
        prompts[7]
    json.dumps(prompts.description)


def test_two_sources_with_the_same_ids_are_told_apart(write):
    one, two = write("a/p.jsonl", {"prompt": "a", "id": 1}), write("b/p.jsonl", {"prompt": "b", "id": 1})
    with pytest.raises(DataError, match=r"both have a prompt 'p/1'.*label"):
        load_prompts([one, two])
    assert load_prompts([one, {"path": two, "label": "q"}]).ids == ["p/1", "q/1"]


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


def test_mistakes_in_sources_are_named_all_at_once():
    with pytest.raises(DataError) as refused:
        load_prompts(["tiny-maht", {"surce": "x"}, {"limit": 3}, {"source": "gsm8k", "limit": "all"}, 7,
                      {"path": "a/b", "columns": {"promt": "q"}}, {"path": "a/b", "columns": {"id": "i"}},
                      {"source": "a/b", "path": "c/d"}, {"source": "gsm8k", "limit": 0},
                      {"path": "a/b", "columns": {"prompt": 3, "meta": ["a", "b"]}}])  # fmt: skip
    text = str(refused.value)
    for said in (
        "'tiny-maht': no such source; did you mean 'tiny-math'?",
        "unknown key 'surce'; did you mean 'source'?",
        "{'limit': 3}: it has neither source nor path",
        "limit must be int, found 'all'",
        "7: a source of prompts is a name or a mapping",
        "columns: unknown 'promt'; did you mean 'prompt'?",
        "columns: give either prompt, a text, or messages, a conversation",
        "both source and path",
        "limit must be at least 1, found 0",
        "columns: prompt must be the name of a column, found 3",
    ):
        assert said in text
    with pytest.raises(DataError, match="no source"):
        load_prompts([])


def test_templates_leave_latex_alone():
    assert fill("\\boxed{}: {prompt}", {"prompt": "$x^{2}$ {a}"}) == "\\boxed{}: $x^{2}$ {a}"
    assert fill("\\frac{{a}}{{b}} {prompt}", {"prompt": "?"}) == "\\frac{a}{b} ?"
    with pytest.raises(ValueError, match=r"\{promt\} is neither .* did you mean 'prompt'"):
        fill("{promt}", {"prompt": ""})


def test_conversations_end_with_a_question():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert read_turns(turns) == turns
    assert read_turns(turns, first_turn=True) == turns[:1]
    assert read_turns(turns[:2]) == turns[:1]
    with pytest.raises(ValueError, match="nobody asks"):
        read_turns(turns[1:2])
