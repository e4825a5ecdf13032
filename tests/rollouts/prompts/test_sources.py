"""The paper's sources in tiny copies with their own columns."""

import json

import datasets
import places
import pytest
from PIL import Image
from prompt_rows import make_image, texts

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.prompts import load_prompts

SHARED = places.SHARED / "data"
ASKED = "Please reason step by step, and put your final answer within \\boxed{}.\n\n"
shared = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.exists(), reason="the real data is not beside this checkout"),
]


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
        {**row, "id": "7", "question_id": "f", "dataset": "taco", "split": "train", "index": "-1"},
        {**row, "id": "8", "question_id": "g", "dataset": "taco", "split": "train", "index": None},
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


@pytest.mark.parametrize(("source", "missing"), [("gsm8k", "answer"), ("mathvision", "question")])
def test_a_row_that_lacks_what_the_others_have_is_named(tmp_path, source, missing):
    whole = {"id": 1, "question": "?", "answer": "#### 1", "options": [], "level": 1, "subject": "s", "image": None}
    rows = [whole, {key: value for key, value in whole.items() if key != missing}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"test\.jsonl:2: {missing} is missing"):
        load_prompts({"source": source, "path": str(tmp_path / "test.jsonl")})


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
