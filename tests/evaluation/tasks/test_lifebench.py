import json
from collections import Counter
from dataclasses import replace
from random import Random

import datasets
import pytest
from places import SHARED

from lenvm_lightning.errors import DataError
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.evaluation.results import Measure
from lenvm_lightning.evaluation.samples import Sample
from lenvm_lightning.evaluation.systems import constraint_systems
from lenvm_lightning.evaluation.task import Measured
from lenvm_lightning.evaluation.tasks.lifebench import (
    LifebenchTask,
    build_prompt,
    load_items,
)
from lenvm_lightning.evaluation.tasks.lifebench_prompts import questions, tiny_items
from lenvm_lightning.rollouts.constraint import CONSTRAINTS
from lenvm_lightning.tinyworld import writing

# Words, numbers, braces and 字数 that belong to the tasks, and not to their constraints.
ENGLISH = {
    "id": 3,
    "category": "qa",
    "type": "Knowledge",
    "lang": "en",
    "task": "Why are 100 words long enough for a {haiku}, and must be equal to 5 words?\n\n"
    "The answer must be {word_count_type} {word_count} words long.",
}
CHINESE = {
    "id": 4,
    "category": "create",
    "type": "Story",
    "lang": "cn",
    "task": "为什么“字数”必须等于20字？每行5字。\n\n[要求]你的字数故事，字数必须{word_count_type} {word_count}字。",
}


@pytest.mark.parametrize(("constraint", "demand"), [
    ("equal to", "The answer must be equal to 128 tokens long."),
    ("at most", "The answer must be at most 128 tokens long."),
    ("at least", "The answer must be at least 128 tokens long."),
])  # fmt: skip
def test_english_constraint(constraint, demand):
    before = "Why are 100 words long enough for a {haiku}, and must be equal to 5 words?\n\n"
    assert build_prompt(ENGLISH, constraint, 128) == before + demand


@pytest.mark.parametrize(("constraint", "demand"), [
    ("equal to", "token数必须等于 64。"), ("at most", "token数必须至多有 64。"), ("at least", "token数必须至少有 64。"),
])  # fmt: skip
def test_chinese_constraint(constraint, demand):
    before = "为什么“字数”必须等于20字？每行5字。\n\n[要求]你的字数故事，"
    assert build_prompt(CHINESE, constraint, 64) == before + demand


def test_a_softened_constraint_is_softer_only_where_it_asks_for_a_length():
    text = build_prompt(ENGLISH, "equal to", 32, soften=True)
    assert text.endswith("must be equal to 5 words?\n\nThe answer should be approximately 32 tokens long.")
    assert build_prompt(CHINESE, "equal to", 32, soften=True).endswith(
        "必须等于20字？每行5字。\n\n[要求]你的字数故事，token数应约为 32。"
    )
    for item in (ENGLISH, CHINESE):
        for constraint in ("at most", "at least"):
            assert build_prompt(item, constraint, 32, soften=True) == build_prompt(item, constraint, 32)


@pytest.mark.parametrize(("lang", "task", "length", "text"), [
    ("en", "Use {word_count_type} {word_count} words.", 7, "Use at most 7 tokens."),
    ("en", "Use {word_count_type} {word_count} words.", 1, "Use at most 1 token."),
    ("en", "Write {word_count_type} a {word_count}-word essay.", 9, "Write at most a 9-token essay."),
    ("en", "Be {word_count_type} {word_count} tokens long.", 9, "Be at most 9 tokens long."),
    ("cn", "请写{word_count_type}{word_count}字的故事。", 9, "请写至多有9 token的故事。"),
    ("cn", "请写{word_count_type}{word_count}个字。", 9, "请写至多有9 token。"),
    ("cn", "字数{word_count_type} {word_count}。", 9, "token数至多有 9。"),
    ("cn", "token数{word_count_type} {word_count} token。", 9, "token数至多有 9。"),
])  # fmt: skip
def test_other_units(lang, task, length, text):
    assert build_prompt({"lang": lang, "task": task}, "at most", length) == text


@pytest.mark.parametrize(("change", "message"), [
    ({"task": "Be {word_count_type} long."}, r"\{word_count\} once, .* found it 0 times"),
    ({"task": "Be {word_count} words long."}, r"\{word_count_type\} once, .* found it 0 times"),
    ({"task": "{word_count_type} {word_count} words {word_count} words"}, "found it 2 times"),
    ({"task": "Be {word_count_type} {word_count} pages long."}, "expected 'words' .* found ' pages long.'"),
    ({"lang": "cn", "task": "写{word_count_type}{word_count}页。"}, "expected '字' .* found '页。'"),
    ({"lang": "zh"}, "lang must be en or cn, found 'zh'"),
    ({"task": None}, "task must be a text"),
])  # fmt: skip
def test_no_prompt_without_its_constraint(change, message):
    with pytest.raises(ValueError, match=message):
        build_prompt({**ENGLISH, **change}, "at most", 64)


def test_constraints_that_are_none():
    with pytest.raises(ValueError, match="constraint must be one of equal to, at most, at least; got 'about'"):
        build_prompt(ENGLISH, "about", 64)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        build_prompt(ENGLISH, "at most", 0)
    hard = {"lang": "en", "task": "Use {word_count_type} {word_count} words."}
    assert build_prompt(hard, "at most", 5, soften=True) == "Use at most 5 tokens."
    with pytest.raises(ValueError, match="could be softened"):
        build_prompt(hard, "equal to", 5, soften=True)


def test_questions_have_ids_and_targets():
    asked = questions([ENGLISH, CHINESE], lengths=[32, 128])
    assert len({question.prompt.prompt_id for question in asked}) == len(asked) == 2 * 3 * 2
    first = asked[0]
    assert first.prompt.prompt_id == "lifebench/en/3/equal-to/32"
    assert (first.constraint, first.target) == ("equal to", 32)
    assert first.prompt.meta == {"item": 3, "lang": "en", "category": "qa"}
    assert first.prompt.messages == [{"role": "user", "content": build_prompt(ENGLISH, "equal to", 32)}]
    soft = questions([ENGLISH], ["equal to", "at most"], [32], soften=True)
    assert [question.prompt.prompt_id.partition("3/")[2] for question in soft] == ["equal-to/32/softened", "at-most/32"]


def test_questions_tell_all_that_is_wrong():
    with pytest.raises(
        ValueError, match=r"got 'about'; .* got 0; constraint 'at most' is given twice; length 5 is given"
    ):
        questions([ENGLISH], ["at most", "about", "at most"], [5, 0, 5])
    with pytest.raises(
        DataError, match=r"3 rows(.|\n)*item en/3: the id 3 is that of(.|\n)*en/5: task(.|\n)*cn/5: cat"
    ):
        questions([ENGLISH, ENGLISH, {**ENGLISH, "id": 5, "task": "?"}, {**CHINESE, "id": 5, "category": None}])


def test_tiny_questions_are_what_the_tiny_generator_was_trained_on():
    items = tiny_items(40)
    lengths = [16, 37, 256]
    asked = questions(items, lengths=lengths)
    expected = [
        writing.WritingProblem(topic, constraint, length).prompt
        for topic in writing.unseen_topics(40)
        for constraint in CONSTRAINTS
        for length in lengths
    ]
    assert [question.prompt.messages[0]["content"] for question in asked] == expected
    ids = {item["id"] for seed in range(3) for item in tiny_items(40, seed)}
    assert len(ids) == 120
    [soft] = questions(items[:1], ["equal to"], [64], soften=True)
    assert soft.prompt.messages[0]["content"].endswith("The text should be approximately 64 tokens long.")


# -- items ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    """Twelve items, sorted by kind: eight English, of two categories, and four Chinese."""
    return [{**ENGLISH, "id": i, "category": "qa" if i < 4 else "create"} for i in range(8)] + [
        {**CHINESE, "id": i} for i in range(4)
    ]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_items_of_a_file(rows, tmp_path):
    file = write(tmp_path / "items.jsonl", rows)
    assert load_items(file) == rows
    assert load_items(str(file), languages=["cn"]) == rows[8:]
    assert load_items(file, limit=99) == rows


@pytest.mark.parametrize("limit", [3, 6])
def test_a_limit_keeps_the_mix(rows, tmp_path, limit):
    kinds = Counter((item["lang"], item["category"]) for item in rows)
    few = load_items(write(tmp_path / "sorted.jsonl", rows), limit=limit)
    assert len({(item["lang"], item["id"]) for item in few}) == limit
    share = limit / len(rows)
    assert Counter((item["lang"], item["category"]) for item in few) == {k: n * share for k, n in kinds.items()}
    Random(0).shuffle(rows)
    mixed = load_items(write(tmp_path / "mixed.jsonl", rows), limit=limit)
    assert Counter((i["lang"], i["category"]) for i in mixed) == Counter((i["lang"], i["category"]) for i in few)
    assert [item for item in rows if item in mixed] == mixed


def test_items_of_a_data_set(rows, tmp_path):
    parts = {"main": datasets.Dataset.from_list(rows), "lite": datasets.Dataset.from_list(rows[:2])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert load_items(tmp_path / "set", split="main") == rows
    with pytest.raises(DataError, match="splits main, lite: say which"):
        load_items(tmp_path / "set")
    with pytest.raises(DataError, match="no split 'light'; did you mean 'lite'"):
        load_items(tmp_path / "set", split="light")


def test_all_broken_lines_are_told_at_once(tmp_path):
    file = tmp_path / "items.jsonl"
    write(file, [ENGLISH, {**ENGLISH, "task": "Why?", "id": 7}, {**CHINESE, "lang": "zh"}, {**ENGLISH, "category": 1}])
    with file.open("a") as lines:
        lines.write("{\n[1]\n")
    with pytest.raises(DataError) as caught:
        load_items(file)
    text = str(caught.value)
    assert f"5 rows of {file} cannot be used" in text
    for line, reason in {
        2: "{word_count} once",
        3: "found 'zh'",
        4: "the id 3 is that of",
        5: "it is not JSON",
        6: "must hold a JSON object",
    }.items():
        assert any(f":{line}: " in told and reason in told for told in text.splitlines()), text


def test_items_that_cannot_be_had(tmp_path):
    file = write(tmp_path / "items.jsonl", [ENGLISH])
    for keywords, message in [
        ({"languages": ["zh"]}, "en and cn"),
        ({"languages": []}, "en and cn"),
        ({"languages": ["cn"]}, "no items in cn"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"split": "test"}, "leave split and name out"),
    ]:
        with pytest.raises(DataError, match=message):
            load_items(file, **keywords)
    with pytest.raises(DataError, match="there is no file"):
        load_items(tmp_path / "others.jsonl")


# -- tables -----------------------------------------------------------------------------------------------------------


def answered(system, item, constraint, target, tokens, score, deviation, number=0):
    found = {
        "constraint": constraint,
        "target": target,
        "item": item,
        "lang": "en",
        "score": score,
        "deviation": deviation,
    }
    question = f"{item}/{constraint}/{target}"
    return Sample(system, question, number, tokens, "stop", -0.5 * tokens, found, "", [5] * tokens)


def findings(samples, lengths=(16, 32), constraints=("equal to",)):
    settings = read_settings({"task": "lifebench", "lengths": list(lengths), "constraints": list(constraints)}, "test")
    systems = constraint_systems(list(samples))
    return LifebenchTask().summarise(Measured(settings, systems, samples, []))


def test_rows_by_hand():
    """Items score 100 and 50 at N=16, 80 and 60 at N=32: 90 and 55 in the mean, each an error of 17.5 from 72.5."""
    samples = [
        answered("base", "x", "equal to", 16, 16, 100.0, 0.0), answered("base", "y", "equal to", 16, 12, 50.0, -0.25),
        answered("base", "x", "equal to", 32, 40, 80.0, 0.25), answered("base", "y", "equal to", 32, 48, 60.0, 0.5),
    ]  # fmt: skip
    [table] = findings({"base": samples}).tables
    short, long, mean = table.rows
    assert [row.label for row in table.rows] == [{"system": "base", "N": n} for n in ("16", "32", "mean")]
    assert [(row.samples, row.questions) for row in table.rows] == [(2, 2), (2, 2), (4, 4)]
    assert short.measures["length_score"] == Measure(75.0, pytest.approx(25.0))
    assert long.measures["length_score"] == Measure(70.0, pytest.approx(10.0))
    assert mean.measures["length_score"] == Measure(72.5, pytest.approx(17.5))
    assert short.measures["deviation"] == Measure(
        0.125, pytest.approx(0.125)
    )  # of abs(LD), by its mark not by its sign
    assert long.measures["deviation"] == Measure(0.375, pytest.approx(0.125))
    assert mean.measures["deviation"].value == 0.25
    assert short.measures["length_share"].value == 14 / 16
    assert long.measures["length_share"].value == 44 / 32
    assert mean.measures["length_share"].value == pytest.approx((14 / 16 + 44 / 32) / 2)
    assert mean.measures["tokens"].value == (14 + 44) / 2
    assert mean.measures["logprob_per_token"] == Measure(-0.5)
    assert mean.measures["truncated_share"] == Measure(0.0)
    assert short.measures["within_10_percent"].value == 0.5
    assert long.measures["within_10_percent"].value == 0.0
    assert short.measures["repetition"].value == pytest.approx((12 / 13 + 8 / 9) / 2)  # one token, again and again


def test_the_price_stands_beside_texts_of_base_that_are_that_long():
    """5 texts of `base` have 15 to 17 tokens, for whatever target; those of 14 and 18 are too far from 16."""
    lengths = [14, 15, 16, 16, 17, 17, 18]
    base = [answered("base", f"x{i}", "equal to", 32, tokens, 0.0, 0.0) for i, tokens in enumerate(lengths)]
    base = [replace(sample, logprob=-float(sample.tokens**2)) for sample in base]
    ours = [answered("ours", "x", "equal to", 16, 16, 100.0, 0.0)]
    [table] = findings({"base": base, "ours": ours}).tables
    [row] = [row for row in table.rows if row.label == {"system": "ours", "N": "16"}]
    squares = 15**2 + 2 * 16**2 + 2 * 17**2
    assert row.measures["logprob_of_base"].value == pytest.approx(-squares / (15 + 2 * 16 + 2 * 17))
    [few] = findings({"base": base[:5], "ours": ours}).tables
    assert few.rows[-2].measures["logprob_of_base"].value is None


def test_each_length_counts_alike_however_many_samples_it_has():
    samples = [answered("base", "x", "equal to", 16, 16, 100.0, 0.0, number) for number in range(3)]
    samples += [answered("base", "x", "equal to", 32, 48, 40.0, 0.5)]
    mean = findings({"base": samples}).tables[0].rows[-1]
    assert mean.measures["length_score"].value == 70.0


def test_constraints_and_systems_do_not_mix():
    samples = {
        name: [
            answered(name, "x", constraint, n, n, score, 0.0)
            for constraint, score in (("equal to", 90.0 + plus), ("at least", 60.0 + plus))
            for n in (16, 32)
        ]
        for name, plus in (("base", 0.0), ("ours", 5.0))
    }
    found = findings(samples, constraints=("equal to", "at least"))
    scores = {
        (table.title, row.label["system"], row.label["N"]): row.measures["length_score"].value
        for table in found.tables
        for row in table.rows
    }
    assert len(scores) == 12
    assert scores["equal to N tokens", "base", "mean"] == 90.0
    assert scores["equal to N tokens", "ours", "16"] == 95.0
    assert scores["at least N tokens", "base", "32"] == 60.0
    assert found.curves["at least/ours"] == {"N": [16, 32], "length_score": [65.0, 65.0], "tokens": [16.0, 32.0]}


def test_one_length_needs_no_mean_and_an_absent_one_no_row():
    samples = [answered("base", "x", "equal to", 16, 16, 100.0, 0.0)]
    assert [row.label["N"] for row in findings({"base": samples}).tables[0].rows] == ["16"]


# -- the real items, where they lie beside the checkout ---------------------------------------------------------------

REAL = SHARED / "data" / "lifebench"
CHINESE_CONSTRAINTS = {"equal to": "等于", "at most": "至多有", "at least": "至少有"}


@pytest.mark.shared
@pytest.mark.skipif(not REAL.exists(), reason="the real data is not beside this checkout")
@pytest.mark.parametrize("name", ["data_lite", "data_lite_no_summary", "data_no_summary"])
def test_every_real_item_keeps_its_text_and_gets_its_constraint(name):
    items = load_items(REAL / f"{name}.jsonl")
    assert {item["lang"] for item in items} == {"en", "cn"}
    for soften in (False, True):
        asked = questions(items, lengths=[32, 1024], soften=soften)
        assert len(asked) == len(items) * 6
        by_id = {(item["lang"], item["id"]): item for item in items}
        for question in asked:
            item = by_id[question.prompt.meta["lang"], question.prompt.meta["item"]]
            check(item["task"], item["lang"], question, soften)


def check(task, lang, question, soften):
    text = question.prompt.messages[0]["content"]
    number = str(question.target)
    assert text.count(number) == task.count(number) + 1
    assert "{word_count" not in text
    soft = soften and question.constraint == "equal to"
    # The constraint is the last clause of every real item; all before it is the item's own.
    start = task.rindex("must be {" if lang == "en" else "字数必须{")
    assert text.startswith(task[:start])
    demand = text[start:]
    if lang == "en":
        assert (
            demand == f"{'should be approximately' if soft else f'must be {question.constraint}'} {number} tokens long."
        )
    else:
        assert demand == f"token数{'应约为' if soft else f'必须{CHINESE_CONSTRAINTS[question.constraint]}'} {number}。"
    assert text.count("words") == task.count("words") - (lang == "en")
    assert text.count("字") == task.count("字") - 2 * (lang == "cn")
