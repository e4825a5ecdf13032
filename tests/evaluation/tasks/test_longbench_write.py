"""LongBench-Write: its score and its way to count words by hand, its layout, targets in tokens, tables."""

import json
from dataclasses import replace

import pytest
from places import SHARED

from lenvm_lightning.cli.evaluate import main
from lenvm_lightning.errors import DataError, EvaluationError
from lenvm_lightning.evaluation import tasks
from lenvm_lightning.evaluation.prepare import prepare
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.evaluation.results import Measure, Results
from lenvm_lightning.evaluation.samples import Sample
from lenvm_lightning.evaluation.task import Measured
from lenvm_lightning.evaluation.tasks.longbench_words import count_words, language_of, words_score
from lenvm_lightning.evaluation.tasks.longbench_write import load_items
from lenvm_lightning.guidance import EqualTo
from lenvm_lightning.rollouts.generators.interface import GeneratedText

TASK = tasks.get("longbench-write")
ROWS = [
    {"prompt": "Write a 300-word story.", "type": "Literature and Creative Writing", "length": 300},
    {"prompt": "写一个600字的故事。", "type": "Literature and Creative Writing", "length": 600},
    {"prompt": "Write 2000 words on the sea.", "type": "Popular Science", "length": 2000},
    {"prompt": "以“sea”为题，写20000字。", "type": "Academic and Monograph", "length": 20000},
]


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "longbench_write.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.mark.parametrize(("words", "required", "score"), [
    (400, 400, 100),
    (800, 400, 100 * (1 - 1 / 3)),  # twice as many
    (1000, 400, 50),  # 1 - 1.5 / 3
    (1600, 400, 0), (2000, 400, 0),  # four times as many, and more
    (200, 400, 50),  # half: 1 - 1 / 2
    (320, 400, 87.5),  # 1 - 0.25 / 2
    (100, 400, 0), (1, 400, 0), (0, 400, 0),  # a third is 0 already
])  # fmt: skip
def test_score_by_hand(words, required, score):
    assert words_score(words, required) == pytest.approx(score)
    with pytest.raises(ValueError, match="at least 1 word"):
        words_score(5, 0)


@pytest.mark.parametrize(("text", "words"), [
    ("Two words.", 2),
    ("It's a well-known fact", 6),  # it, s, a, well, known, fact
    ("In 2024 we wrote 3 texts", 4),  # numbers are none
    ("GPT4 and x_1", 1),  # a digit or an underscore beside letters leaves no boundary
    ("你好，世界！", 4),
    ("我用 Python 写 code。", 5),
    ("我用Python写", 3),  # Chinese characters are letters too: there is no boundary
    ("", 0),
    ("…\n\n—", 0),
])  # fmt: skip
def test_words_are_counted_as_the_benchmark_counts_them(text, words):
    assert count_words(text) == words


def test_the_language_is_that_of_most_of_the_prompt():
    assert [language_of(row["prompt"]) for row in ROWS] == ["en", "cn", "en", "cn"]
    assert language_of("Write a report on 上海 in Chinese") == "en"
    assert language_of("") == "en"


def test_rows_in_the_layout_of_the_benchmark(file):
    assert [item["length"] for item in load_items(str(file))] == [300, 600, 2000, 20000]
    assert [item["id"] for item in load_items(str(file), ["cn"])] == ["1", "3"]
    with pytest.raises(DataError, match="languages must be some of en and cn"):
        load_items(str(file), ["zh"])
    file.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match="no prompts in cn"):
        load_items(str(file), ["cn"])


def test_all_broken_rows_are_told_at_once(file):
    broken = [{**ROWS[0], "length": "300"}, {**ROWS[0], "prompt": " "}, {**ROWS[0], "type": None, "length": 0}]
    file.write_text("".join(json.dumps(row) + "\n" for row in broken) + "[1]\n")
    with pytest.raises(DataError) as caught:
        load_items(str(file))
    told = str(caught.value)
    for words in (
        "4 rows of", ":1: length must be a whole number of at least 1, found '300'", ":2: prompt must be a text",
        ":3: length must be a whole number of at least 1, found 0; type must be a text",
        ":4: it must hold a JSON object",
    ):  # fmt: skip
        assert words in told


def settings_of(**given):
    return read_settings({"task": "longbench-write", "generator": "tiny-text", **given}, "test")


def test_the_protocol_of_the_benchmark(file):
    prepared = prepare(settings_of(data=str(file), compare=True))
    assert (prepared.settings.n, prepared.sampling.temperature, prepared.sampling.max_tokens) == (1, 0.5, 32768)
    assert [system.name for system in prepared.systems] == ["base", "ours", "paper"]
    assert len(prepared.questions.prompts) == prepared.questions.of == 4
    assert prepared.questions.prompts[0].messages == [{"role": "user", "content": ROWS[0]["prompt"]}]
    few = prepare(settings_of(data={"path": str(file)}, limit=2))
    assert {prompt.meta["lang"] for prompt in few.questions.prompts} == {"en", "cn"}
    assert (len(few.questions.prompts), few.questions.of) == (2, 4)
    given = prepare(settings_of(data=str(file), top_k=0))
    assert given.systems[1].sampling == {"top_p": 0.999}  # what is given holds for all systems
    with pytest.raises(EvaluationError, match="takes a path"):
        prepare(settings_of(data={"file": str(file)}))


def written(system, lang, required, words, tokens, prompt="p", number=0, **more):
    found = {"required": required, "words": words, "score": words_score(words, required), "lang": lang, "type": "t"}
    ids = [5] * tokens
    return Sample(system, prompt, number, tokens, "stop", -0.5 * tokens, {**found, **more}, "", ids)


def test_targets_are_the_tokens_a_word_of_base_by_language(file):
    """English: 150 tokens for 100 words, and 450 for 200: 2.0 a word. Chinese: 0.75."""
    prepared = prepare(settings_of(data=str(file), systems=["ours", "base"]))
    base, ours = prepared.systems
    assert base.name == "base"  # measured first
    done = {
        "ours": [],
        "base": [
            written("base", "en", 300, 100, 150), written("base", "en", 2000, 200, 450),
            written("base", "cn", 600, 400, 300),
        ],
    }  # fmt: skip

    def prompts_of(system, **given):
        own = replace(prepared.settings.own, **given)
        return TASK.prompts_for(system, replace(prepared.settings, own=own), prepared.questions, done)

    assert prompts_of(base) is prepared.questions.prompts
    asked = prompts_of(ours)
    assert [prompt.meta["target"] for prompt in asked] == [600, 450, 4000, 15000]
    assert ours.control(asked[0].meta) == EqualTo(600)
    assert [prompt.messages for prompt in asked] == [prompt.messages for prompt in prepared.questions.prompts]
    assert [prompt.meta["target"] for prompt in prompts_of(ours, tokens_per_word={"en": 1.5})] == [
        450,
        450,
        3000,
        15000,
    ]
    done["base"].pop()
    with pytest.raises(EvaluationError, match="`base` wrote no words for prompts in cn"):
        prompts_of(ours)


def test_targets_stay_where_an_evaluation_goes_on(file):
    """A completion of base that failed before and is there now must not move the targets of what is written."""
    prepared = prepare(settings_of(data=str(file), languages=["en"]))
    before = written("ours", "en", 300, 290, 400, target=600, tokens_per_word=2.0)
    done = {"base": [written("base", "en", 300, 100, 300)], "ours": [before]}
    asked = TASK.prompts_for(prepared.systems[1], prepared.settings, prepared.questions, done)
    assert [prompt.meta["target"] for prompt in asked] == [600, 4000]


def test_without_base_tokens_a_word_have_to_be_given(file):
    with pytest.raises(EvaluationError, match=r"measure `base` beside ours.*--tokens-per-word for cn"):
        prepare(settings_of(data=str(file), systems=["ours"], tokens_per_word={"en": 1.5}))
    prepare(settings_of(data=str(file), systems=["ours"], languages=["en"], tokens_per_word={"en": 1.5}))


def test_judging_counts_words():
    meta = {"required": 4, "lang": "en", "type": "t", "constraint": "equal to", "target": 4}
    text = GeneratedText("So it ends.", [1, 2, 3, 4, 5], "stop", None, 0)
    assert TASK.judge(meta, text) == {
        "required": 4, "words": 3, "score": pytest.approx(100 * (1 - (4 / 3 - 1) / 2)), "lang": "en", "type": "t",
    }  # fmt: skip
    assert TASK.judge({**meta, "target": 6, "tokens_per_word": 1.5}, text)["target"] == 6


def test_tables_by_hand():
    samples = {
        "base": [
            written("base", "en", 400, 400, 600, "a"), written("base", "en", 499, 998, 998, "b"),
            written("base", "cn", 500, 250, 150, "c"), written("base", "en", 20000, 0, 1, "d"),
        ],
        "ours": [written("ours", "en", 400, 400, 500, "a", target=560, tokens_per_word=1.4)],
    }  # fmt: skip
    prepared_settings = settings_of(data="x.jsonl")
    measured = Measured(prepared_settings, TASK.systems(prepared_settings, ["base", "ours"]), samples, [])
    found = TASK.summarise(measured)
    by_length, by_language = found.tables
    rows = {(row.label["system"], row.label["required"]): row for row in by_length.rows}
    assert list(rows) == [
        ("base", "[0, 500)"), ("base", "[500, 2,000)"), ("base", "4,000 and more"), ("base", "all"),
        ("ours", "[0, 500)"), ("ours", "all"),
    ]  # fmt: skip
    short = rows["base", "[0, 500)"].measures
    assert short["length_score"] == Measure(pytest.approx(250 / 3), pytest.approx(50 / 3))  # of 100 and 66.7
    assert short["length_share"] == Measure(1.5, pytest.approx(0.5))
    assert short["tokens_per_word"] == Measure(1598 / 1398)
    assert short["logprob_per_token"] == Measure(-0.5)
    assert rows["base", "4,000 and more"].measures["tokens_per_word"] == Measure(None)
    # The mean is over prompts, not over ranges: (100 + 66.7 + 50 + 0) / 4.
    assert rows["base", "all"].measures["length_score"].value == pytest.approx((100 + 200 / 3 + 50) / 4)
    assert {(row.label["system"], row.label["language"]): row.samples for row in by_language.rows} == {
        ("base", "en"): 3, ("base", "cn"): 1, ("ours", "en"): 1,
    }  # fmt: skip
    assert by_length.notes[-1] == (
        "Targets of controls are the required words times the tokens a word: 1.400 for en (as `base` wrote)."
    )
    assert found.curves["base"] == {"required": [400, 499, 500, 20000], "words": [400, 998, 250, 0]}


def test_from_end_to_end(file, tmp_path, capsys):
    """A file in the benchmark's layout on the embedded pair: targets, samples and report fit each other."""
    rows = [{**row, "length": 8 + 4 * number} for number, row in enumerate(ROWS)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    words = ["--task", "longbench-write", "--generator", "tiny-text", "--data", str(file), "--max-tokens", "60"]
    words += ["--tokens-per-word", "{cn: 2.5}", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    base = [one for one in samples if one["system"] == "base" and one["found"]["lang"] == "en"]
    ratio = sum(one["tokens"] for one in base) / sum(count_words(one["text"]) for one in base)
    for one in samples:
        found = one["found"]
        assert found["words"] == count_words(one["text"])
        if one["system"] == "ours":
            assert found["tokens_per_word"] == (2.5 if found["lang"] == "cn" else ratio)
            assert found["target"] == max(1, round(found["required"] * found["tokens_per_word"]))
    results = Results.from_dict(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert results.provenance["systems"] == {"base": {}, "ours": {"top_k": 15, "top_p": 0.999}}
    assert f"2.500 for cn (given), {ratio:.3f} for en (as `base` wrote)" in capsys.readouterr().out


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "data" / "longwriter").exists(), reason="the real data is not beside this checkout")
def test_the_real_prompts():
    items = load_items(str(SHARED / "data" / "longwriter" / "longbench_write.jsonl"))
    assert len(items) == 120
    assert min(item["length"] for item in items) == 100
    assert max(item["length"] for item in items) == 20000
    assert [language_of(item["prompt"]) for item in items].count("cn") == 60
