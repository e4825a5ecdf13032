"""`lenvm-eval` as people type it: every task on the embedded pair, local data sets in their own layouts, mistakes."""

import json
import re
import shutil

import datasets
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.evaluate import main
from lenvm_lightning.evaluation import evaluate as evaluation
from lenvm_lightning.evaluation import models
from lenvm_lightning.evaluation.plots import as_png, new_figure
from lenvm_lightning.evaluation.prepare import prepare
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.evaluation.results import Results


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Found:
    """What a call left in its folder."""

    def __init__(self, folder):
        self.folder = folder
        self.content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        self.results = Results.from_dict(self.content)
        self.report = (folder / "report.md").read_text(encoding="utf-8")
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        self.samples = [json.loads(line) for line in lines]

    def row(self, **label):
        [row] = [r for t in self.results.tables for r in t.rows if label.items() <= r.label.items()]
        return row.measures


def run(here, words, status=0):
    assert main(words.split()) == status
    [folder] = (here / "results").iterdir()
    return Found(folder)


def rows(file, *content):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")


PAIR = "tiny-text + tiny-text-lenvm · γ 0.99 · seed 0"
TASKS = {
    "lifebench --limit 2 --n 1 --lengths 16 32": (
        f"lifebench v1 · {PAIR}", "12 questions, 24 completions", 24, "| system | N    |", "LS ↑", {"constraints"},
        "lifebench/at_most_N_tokens/ours/mean/length_score",
    ),
    "gsm8k --limit 2 --n 2 --compare --max-tokens 150": (
        f"gsm8k v1 · {PAIR}", "2 questions, 24 completions", 24, "| system     |  n |", "Pass@1 ↑", {"frontier"},
        "gsm8k/tilt:-2/gain",
    ),
    "vqa --limit 2 --n 1 --max-tokens 100": (
        "vqa v1 · tiny-vl + tiny-vl-lenvm · γ 0.99 · seed 0", "2 questions, 4 completions", 4, "| system  |",
        "truncated ↓", {"frontier"}, "vqa/base/pass_at_1",
    ),
    "length --limit 4 --n 2 --max-tokens 200": (
        f"length v1 · {PAIR}", "4 questions, 8 completions", 8, "| position |", "MRE ↓", {"prediction"},
        "length/by_position/50/mae_tokens",
    ),
    "longbench-write --limit 4 --n 1 --max-tokens 300": (
        f"longbench-write v1 · {PAIR}", "4 questions, 8 completions", 8, "| system | required ", "S_l ↑",
        {"required_and_written"}, "longbench-write/by_language_of_the_prompt/ours/en/length_score",
    ),
    "tokens --limit 20 --n 1 --max-tokens 40": (
        f"tokens v1 · {PAIR}", "20 questions, 20 completions", 20, "| word", "mean residual",
        {"words_by_mean", "words_by_share"}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", TASKS)
def test_a_task_leaves_everything_and_is_not_repeated(words, here, monkeypatch, capsys):
    provenance, sizes, count, table, arrow, plots, scalar = TASKS[words]
    found = run(here, f"--task {words}")
    out = capsys.readouterr().out
    for text in (found.report, out):
        asked, completions = sizes.split(" questions, ")
        for part in (
            provenance,
            f"\n{asked} of ",
            f", {completions}",
            f"> {tinyworld.NOTICE}",
            table,
            arrow,
            " ± ",
            f"lenvm-eval --task {words}",
        ):
            assert part in text, part
    assert "questions (--limit is for smoke tests, not results)" in found.report
    assert len(found.samples) == found.results.completions == count
    assert len({(one["system"], one["prompt_id"], one["number"]) for one in found.samples}) == count
    assert found.results.as_dict() == found.content
    assert found.results.tiny_world
    assert {file.stem for file in found.folder.glob("*.png")} == plots
    for file in found.folder.glob("*.png"):
        with Image.open(file) as image:
            assert len(image.convert("L").getcolors()) > 20  # something is drawn
    events = EventAccumulator(str(found.folder / "tensorboard")).Reload()
    assert {tag.rpartition("/")[2] for tag in events.Tags()["images"]} == plots
    if scalar:
        assert scalar in events.Tags()["scalars"]
        *_, name = scalar.split("/")
        values = {r.measures[name].value for t in found.results.tables for r in t.rows if name in r.measures}
        assert any(events.Scalars(scalar)[0].value == pytest.approx(value) for value in values if value is not None)
    written = {file.name: file.stat().st_mtime_ns for file in found.folder.iterdir()}

    monkeypatch.setattr(models, "open_generator", None)  # would be an error to call
    again = run(here, f"--task {words}")
    told = capsys.readouterr()
    assert "is complete for these settings" in told.err
    assert found.report in told.out
    assert {file.name: file.stat().st_mtime_ns for file in again.folder.iterdir()} == written


def test_other_settings_have_another_folder(here):
    words = ["--task", "lifebench", "--limit", "1", "--n", "1", "--lengths", "16", "--constraints", "equal to"]
    for more in (["--systems", "base"], ["--systems", "base", "--seed", "1"], ["--systems", "base", "--device", "cpu"]):
        assert main([*words, *more]) == 0
    assert len(list((here / "results").iterdir())) == 2  # where it runs is no setting of what is measured
    assert main([*words, "--systems", "base", "--dtype", "bfloat16"]) == 0
    assert len(list((here / "results").iterdir())) == 3
    taken = next((here / "results").iterdir())
    assert main([*words, "--systems", "base", "--seed", "2", "--out", str(taken)]) == 2


GSM8K = [
    {"question": f"Ann has {n} eggs and sells 2. How many are left?", "answer": f"{n} - 2 = {n - 2}\n#### {n - 2}"}
    for n in (20, 31, 7)
]


def test_a_part_of_a_data_set_is_no_result(here, capsys):
    rows(here / "test.jsonl", *GSM8K)
    words = "--task gsm8k --data test.jsonl --n 2 --max-tokens 30 --systems base"
    found = run(here, f"{words} --limit 2")
    assert "2 of 3 questions (--limit is for smoke tests, not results), 4 completions" in found.report
    assert (found.results.questions, found.results.questions_of) == (2, 3)
    assert found.results.tiny_world  # the generator is of the tiny world
    assert main([*words.split(), "--out", "whole"]) == 0
    assert "3 of 3 questions, 6 completions" in capsys.readouterr().out


def test_math500_in_its_own_layout(here):
    row = {"problem": "What is half of one?", "solution": "...", "answer": r"\frac{1}{2}", "subject": "Algebra"}
    rows(here / "test.jsonl", *({**row, "level": 2, "unique_id": f"test/algebra/{k}.json"} for k in range(2)))
    found = run(here, "--task math500 --data test.jsonl --n 1 --max-tokens 20 --systems base")
    assert "2 of 2 questions" in found.report
    assert {one["prompt_id"] for one in found.samples} == {f"math500/test/algebra/{k}.json" for k in range(2)}


def write_images(folder):
    (folder / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (56, 56), ("red", "blue")[number]).save(folder / "images" / f"{number}.png")


def test_mathvision_in_its_own_layout(here):
    write_images(here)
    row = {"id": "4", "question": "Which?\n<image1>", "options": ["4", "8"], "image": "images/0.png", "answer": "B",
           "solution": None, "level": 3, "subject": "counting"}  # fmt: skip
    rows(here / "test.jsonl", row, {**row, "id": "5", "options": [], "answer": "8", "image": "images/1.png"})
    found = run(here, "--task vqa --data test.jsonl --n 1 --max-tokens 20 --systems base tilt:-5")
    assert "2 of 2 questions, 4 completions" in found.report
    assert found.content["provenance"]["questions"]["sources"][0]["source"] == "mathvision"
    assert {one["prompt_id"] for one in found.samples} == {"mathvision/4", "mathvision/5"}


def test_mathvista_in_its_own_layout(here):
    write_images(here)
    row = {"pid": "1", "question": "How far?", "decoded_image": "images/0.png", "choices": ["1", "2"], "unit": "cm",
           "precision": None, "answer": "2", "question_type": "multi_choice", "answer_type": "text"}  # fmt: skip
    number = {"choices": None, "answer": "1.2", "answer_type": "float", "precision": 1.0, "question_type": "free_form"}
    rows(here / "testmini.jsonl", row, {**row, **number, "pid": "2", "decoded_image": "images/1.png"})
    found = run(here, "--task vqa --data testmini.jsonl --n 1 --max-tokens 20 --systems base")
    assert "2 of 2 questions" in found.report
    assert found.content["provenance"]["questions"]["sources"][0]["source"] == "mathvista"


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


ITEMS = [
    {"id": 1, "category": "create", "type": "Story", "lang": "en",
     "task": "Write a story.\nThe story must be {word_count_type} {word_count} words long."},
    {"id": 1, "category": "create", "type": "Story", "lang": "cn",
     "task": "写一个故事。\n字数必须{word_count_type}{word_count}字。"},
]  # fmt: skip


def test_lifebench_in_its_own_layout_with_softer_prompts_for_guided_systems(here, monkeypatch):
    asked = {}
    collect = evaluation.collect

    def listening(folder, generator, system, prompts, *rest):
        asked[system.name] = [prompt.messages[0]["content"] for prompt in prompts]
        return collect(folder, generator, system, prompts, *rest)

    monkeypatch.setattr(evaluation, "collect", listening)
    rows(here / "lite.jsonl", *ITEMS)
    words = "--task lifebench --generator tiny-text --data lite.jsonl --n 1 --lengths 16"
    found = run(here, f"{words} --soften --systems base ours")
    assert len(found.samples) == 12
    assert "6 of 6 questions" in found.report
    assert len({one["prompt_id"] for one in found.samples if one["system"] == "base"}) == 6
    assert sum(one["prompt_id"].endswith("/softened") for one in found.samples) == 2
    texts = {name: "\n".join(prompts) for name, prompts in asked.items()}
    assert "must be equal to 16 tokens" in texts["base"]
    assert "必须等于16" in texts["base"]
    assert "approximately" not in texts["base"]
    assert "约为" not in texts["base"]
    assert "should be approximately 16 tokens" in texts["ours"]
    assert "应约为16" in texts["ours"]
    assert "must be at most 16 tokens" in texts["ours"]
    assert main([*words.split(), "--systems", "base", "--languages", "cn", "--out", "cn"]) == 0
    assert len(asked["base"]) == len(Found(here / "cn").samples) == 3
    assert all("token数" in text for text in asked["base"])


MISTAKES = {
    "--task lifebench --systems base paper-equl": r"'paper-equl'; did you mean 'paper-equal'\?",
    "--task gsm8k --systems base ours": r"'ours'.*known: base, base\+min-p, or a control",
    "--task gsm8k --systems tilt:x": r"'tilt:x'.*not a number|control 'tilt:x'",
    "--task gsm8k --generator MODEL --data tiny --systems base tilt:-5": r"tilt:-5: --lenvm is missing",
    "--task length --generator MODEL --data tiny": r"length measures a length value model: --lenvm is missing",
    "--task length --generator MODEL --lenvm tiny-text-lenvm": r"--data is missing: prompts that the length value",
    "--task lifebench --generator MODEL": r"'LIFEBench/LIFEBench' is not on this machine, and the hub",
    "--task length --systems base tilt:-5": r"length measures completions of `base` alone",
    "--task gsm8k --generator http://127.0.0.1:9 --lenvm tiny-text-lenvm --data tiny": r"a server decodes by itself",
    "--task gsm8k --generator http://127.0.0.1:9 --systems tilt:-5 --data tiny": r"tilt:-5: a server decodes by itself",
    "--task gsm8k --data tiny-vqa": r"gsm8k asks no tiny-vqa; in the tiny world it takes tiny, tiny-math",
    "--task lifebench --data tiny-math": r"lifebench asks no tiny-math",
    "--task lifebench --languages cn": r"the tiny world writes English only",
    "--task gsm8k --temperature -1": r"temperature must be",
    "--task gsm8k --top-p 0 --limit 0": r"(?s)limit must be a whole number of at least 1, found 0.*top_p must be above",
    "--task lifebench --languages fr": r"languages must be a list of en, cn",
    "--task nothing": r"task must be one of .*lifebench.*, found 'nothing'",
    "--task lifebnech": r"found 'lifebnech'; did you mean 'lifebench'\?",
    "--task gsm8k --lengths 16 --threshold 0.1": r"(?s)lengths is a setting of lifebench, not of gsm8k.*of tokens, not",
    "--task longbench-write --generator MODEL": r"--data is missing: longbench_write.jsonl",
    "--task longbench-write --languages cn": r"the tiny world writes English only",
    "--task longbench-write --systems ours": r"measure `base` beside ours.*or give --tokens-per-word for en and cn",
    "--task longbench-write --tokens-per-word {de:2}": r"tokens_per_word must be positive numbers by language",
    "--task paper": r"the task `paper` belongs in a recipe with other tasks, see recipes/paper_tiny.yaml",
    "--task gsm8k --data none.jsonl": r"none.jsonl",
    "--task gsm8k --generator none-such --data tiny": r"none-such",
    "--task gsm8k --lenvm none-such": r"none-such",
    "--task scaling": r"scaling: --runs is missing",
    "--task scaling --runs none": r"none",
    "--task ablation --runs none": r"(?s)these are no finished runs:.*none",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_with_a_sentence(words, here, capsys):
    model = str(tinyworld.path("tiny-text"))
    assert main(words.replace("MODEL", model).split()) == 2
    err = capsys.readouterr().err
    assert re.search(MISTAKES[words], err), err
    assert re.match(r"\w+Error: ", err.splitlines()[-1]) or "Error: " in err
    assert "Traceback" not in err
    assert not list(here.glob("results/*/samples.jsonl"))


def test_a_word_that_is_no_number(here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--task", "gsm8k", "--limit", "many"])
    assert stop.value.code == 2
    assert "argument --limit: invalid" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--task", "gsm8k", "--limmit", "3"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --limmit" in capsys.readouterr().err


def test_completions_that_fail_are_told_and_tried_again(here, capsys):
    rows(here / "test.jsonl", *GSM8K[:2], {"question": "Why? " * 5000, "answer": "#### 3"})
    words = "--task gsm8k --data test.jsonl --n 1 --max-tokens 20 --systems base"
    found = run(here, words, status=3)
    assert ", 2 completions, 1 FAILED" in found.report
    assert (len(found.samples), found.results.failed) == (2, 1)
    [failure] = map(json.loads, (found.folder / "failures.jsonl").read_text().splitlines())
    assert failure["reason"] in capsys.readouterr().err
    again = run(here, words, status=3)
    assert again.samples == found.samples
    rows(here / "test.jsonl", {"question": "Why? " * 5000, "answer": "#### 3"})
    assert main([*words.split(), "--out", "none"]) == 2
    assert "not one completion could be had" in capsys.readouterr().err
    assert not (here / "none" / "results.json").exists()


def test_a_value_model_of_another_tokenizer_is_refused(here, capsys, tmp_path):
    """Ids that mean other words would steer by noise."""
    model = tmp_path / "other"
    shutil.copytree(tinyworld.path("tiny-text-lenvm"), model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tinyworld.path("tiny-text") / name, model / name)
    words = json.loads((model / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    words["model"]["vocab"] = dict(zip(ids, reversed(list(ids.values())), strict=True))
    (model / "tokenizer.json").write_text(json.dumps(words))
    assert main(["--task", "gsm8k", "--limit", "1", "--n", "1", "--lenvm", str(model)]) == 2
    assert "has another tokenizer than the generator" in capsys.readouterr().err
