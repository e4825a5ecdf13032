"""Evaluations from end to end: every task on the embedded pair, data sets in their own layouts, kills."""

import json

import pytest
from forks import script
from full_disk import room_for
from PIL import Image
from places import HELPERS
from scripted_server import Response, ScriptedServer, said
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.evaluate import main
from lenvm_lightning.evaluation import evaluate as evaluation
from lenvm_lightning.evaluation import models
from lenvm_lightning.evaluation.results import Results


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
    "gsm8k --limit 2 --n 2 --compare --max-tokens 80": (
        f"gsm8k v1 · {PAIR}", "2 questions, 24 completions", 24, "| system     |  n |", "Pass@1 ↑", {"frontier"},
        "gsm8k/tilt:-2/gain",
    ),
    "vqa --limit 2 --n 1 --max-tokens 100": (
        "vqa v1 · tiny-vl + tiny-vl-lenvm · γ 0.99 · seed 0", "2 questions, 4 completions", 4, "| system  |",
        "truncated ↓", {"frontier"}, "vqa/base/pass_at_1",
    ),
    "length --limit 4 --n 2 --max-tokens 200": (
        f"length v4 · {PAIR}", "4 questions, 8 completions", 8, "| position |", "MRE ↓", {"prediction", "intervals"},
        "length/by_position/50/mae_tokens",
    ),
    "longbench-write --limit 4 --n 1 --max-tokens 200": (
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


WORDS = ["--task", "lifebench", "--limit", "4", "--n", "2", "--lengths", "16", "32"]
WORDS += ["--systems", "base", "ours", "--seed", "5"]


def drive(folder, kills, seed):
    """Run it in processes of their own; what the driver has said."""
    fork = script(HELPERS / "killed_eval.py", str(folder), str(kills), str(seed), *WORDS)
    _, said = fork.communicate(200)
    assert fork.returncode == 0, said
    return said


def lines(folder):
    """Samples by what they are of."""
    found = map(json.loads, (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    return {(one["system"], one["prompt_id"], one["number"]): one for one in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "results"
    assert main([*WORDS, "--out", str(folder)]) == 0
    return folder


def test_killed_at_random_moments(undisturbed, tmp_path):
    told = drive(tmp_path, 3, 1)
    assert told.count("killed at") == 3
    assert "going on from" in told
    # Every sample is there once, whatever was torn, and each is what it would have been.
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == len(lines(tmp_path)) == 96
    assert lines(tmp_path) == lines(undisturbed)
    assert (tmp_path / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()
    assert (tmp_path / "constraints.png").read_bytes() == (undisturbed / "constraints.png").read_bytes()
    assert len({one["system"] for one in lines(tmp_path).values() if one["token_ids"]}) == 2


def test_killed_after_the_last_sample(undisturbed, tmp_path, capsys):
    """What is killed between samples and report: the next call only makes the report."""
    for file in undisturbed.iterdir():
        if file.name in ("samples.jsonl", "settings.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / ".results.json").write_text('{"format": 1, "ta')
    assert main([*WORDS, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "going on from 96 samples" in err
    assert "Tokens/s" not in out
    assert (tmp_path / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    assert (tmp_path / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


def test_a_disk_that_fills_is_said_and_nothing_is_sampled_again(here, capsys):
    """At whatever size files stop growing: one sentence, and then the results of an undisturbed evaluation."""
    command = [*["--task", "lifebench", "--limit", "1", "--n", "1", "--lengths", "16", "--systems", "base"], "--out"]
    assert main([*command, "whole"]) == 0
    sizes = sorted(file.stat().st_size for file in (here / "whole").rglob("*") if file.is_file())
    capsys.readouterr()
    for size in (10, *(one - 1 for one in sizes[:-1]), sizes[-1] - 300):  # the last is that of the curves
        with room_for(size):
            assert main([*command, "full"]) == 2
        told = capsys.readouterr().err
        assert "cannot be written: File too large." in told
        assert "then type the same command again" in told
    assert main([*command, "full"]) == 0
    assert "going on from 3 samples" in capsys.readouterr().err
    assert (here / "full" / "results.json").read_bytes() == (here / "whole" / "results.json").read_bytes()


def test_completions_without_a_seed_are_no_repeatable_measurement(here):
    server = ScriptedServer()
    server.act = lambda body, attempt: Response({"detail": "no seed"}, 400) if "seed" in body else said("4")
    words = f"--task gsm8k --data tiny --generator {server.url} --model m --limit 1 --n 1 --options".split()
    assert main([*words, "{server: other, processor: tiny-text}"]) == 0
    server.stop()
    [folder] = (here / "results").iterdir()
    found = Found(folder)
    assert found.samples[0]["seedless"]
    assert found.results.provenance["seed"] is None
    assert found.report.splitlines()[2] == "gsm8k v1 · m · no seed"


@pytest.mark.parametrize("task", ["lifebench", "scaling"])
def test_results_are_written_into_no_folder_of_something_else(here, capsys, task):
    run_results = {
        "gamma": 0.99, "target": "discounted", "objective": {}, "tiny_world": True, "held_out_digest": "a",
        "held_out_completions": 6, "held_out_prompts": 3, "train_completions": 20, "parameters": 10,
    }  # fmt: skip
    for number in (1, 2):
        (here / f"r{number}").mkdir()
        more = {"train_prompts": 10 * number, "metrics": {"loss": 0.1 / number}}
        (here / f"r{number}" / "results.json").write_text(json.dumps(run_results | more))
    for name in ("report.md", "tensorboard/mine"):
        (here / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "project" / name).write_text(name)
    words = ["--runs", "r1", "r2"] if task == "scaling" else ["--limit", "1", "--n", "1", "--lengths", "16"]
    assert main(["--task", task, *words, "--out", "project"]) == 2
    assert "project is not empty, and " in capsys.readouterr().err
    assert sorted(str(file.relative_to(here / "project")) for file in (here / "project").rglob("*")) == [
        "report.md", "tensorboard", "tensorboard/mine",
    ]  # fmt: skip
    if task == "scaling":
        assert main(["--task", task, *words, "--out", "new"]) == 0
        assert main(["--task", task, *words, "--out", "new"]) == 0
