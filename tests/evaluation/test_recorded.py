"""A value model measured on rollouts that are there."""

import json
from pathlib import Path

import pytest

from lenvm_lightning.cli.evaluate import main as evaluate
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import EvaluationError
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.evaluation.recorded import read_recorded
from lenvm_lightning.evaluation.results import Results
from lenvm_lightning.pipeline.evaluate_stage import needs_generator
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.sample import sample_rollouts


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """What `lenvm-eval --task length --data tiny-math --limit 4 --n 2 --max-tokens 120` samples, as rollouts."""
    prompts = load_prompts([{"source": "tiny-math", "seed": 1, "limit": 4}], split="test")
    folder = tmp_path_factory.mktemp("rollouts")
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=120)
    return sample_rollouts(LocalGenerator.load("tiny-text"), prompts, 2, folder, sampling).rollouts


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def results(folder: Path) -> Results:
    return Results.from_dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def test_the_numbers_are_those_of_sampling_anew(rollouts, tmp_path, monkeypatch, capsys):
    words = "--task length --data tiny-math --limit 4 --n 2 --max-tokens 120 --out"
    assert evaluate([*words.split(), str(tmp_path / "sampled")]) == 0
    # From here on no generator can be loaded.
    monkeypatch.setattr("lenvm_lightning.rollouts.generators.local.generator.load_model", None)
    command = ["--task", "length", "--rollouts", str(rollouts.parent), "--out", str(tmp_path / "read")]
    assert evaluate(command) == 0
    sampled, read = results(tmp_path / "sampled"), results(tmp_path / "read")
    assert read.tables == sampled.tables
    assert (read.completions, read.questions, read.failed) == (8, 4, 0)
    assert read.tables[0].rows[0].samples + read.tables[1].rows[0].samples > 0
    told = read.provenance
    assert (told["generator"], told["seed"]) == ({"name": "tiny-text"}, None)
    assert told["sampling"]["max_tokens"] == 120
    described = told["questions"]["rollouts"]
    assert (described["file"], described["split"]) == (str(rollouts), "test")
    settings = json.loads((tmp_path / "read" / "settings.json").read_text())
    assert settings["questions"]["rollouts"] == described
    # Complete, it is only told; other rollouts are another evaluation.
    capsys.readouterr()
    assert evaluate(command) == 0
    assert "is complete for these settings" in capsys.readouterr().err
    other = write(tmp_path / "other.jsonl", lines(rollouts)[2:])
    assert evaluate([*command[:3], str(other), *command[4:]]) == 2
    assert "questions" in capsys.readouterr().err


def test_stopped_it_goes_on(rollouts, tmp_path, monkeypatch):
    command = ["--task", "length", "--rollouts", str(rollouts), "--out", str(tmp_path / "a")]
    with monkeypatch.context() as patch:
        patch.setattr("lenvm_lightning.evaluation.evaluate.write_prompts", None)  # after all samples were taken
        with pytest.raises(TypeError):
            evaluate(command)
    samples = tmp_path / "a" / "samples.jsonl"
    write(samples, lines(samples)[:3])
    assert evaluate(command) == 0
    assert evaluate([*command[:-1], str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "results.json").read_bytes() == (tmp_path / "b" / "results.json").read_bytes()


def test_other_tasks_read_them_too(rollouts, tmp_path, capsys):
    assert evaluate(["--task", "tokens", "--rollouts", str(rollouts), "--out", str(tmp_path / "results")]) == 0
    assert "4 of 4 questions, 8 completions" in capsys.readouterr().out


def test_held_out_prompts_where_there_are_any(rollouts, tmp_path):
    rows = lines(rollouts)
    ids = list(dict.fromkeys(row["prompt_id"] for row in rows))
    for row in rows:
        row["split"] = {ids[0]: "train", ids[1]: "validation"}.get(row["prompt_id"])
    found = read_recorded(write(tmp_path / "some.jsonl", rows))
    assert [prompt.prompt_id for prompt in found.prompts] == [ids[1]]
    assert found.description["split"] == "test"
    found = read_recorded(write(tmp_path / "none.jsonl", [{**row, "split": "train"} for row in rows]), limit=3)
    assert [prompt.prompt_id for prompt in found.prompts] == ids[:3]
    assert (found.of, found.description["split"]) == (4, None)
    assert [sample.key for sample in found.samples] == [("base", key, number) for key in ids[:3] for number in (0, 1)]


def test_the_limit_is_where_they_were_truncated(rollouts, tmp_path):
    rows = [{**row, "token_ids": row["token_ids"][:30], "finish_reason": "length"} for row in lines(rollouts)]
    assert read_recorded(write(tmp_path / "cut.jsonl", rows)).max_tokens == 30  # though max_tokens says 120
    ended = [{**row, "finish_reason": "stop"} for row in rows]
    assert read_recorded(write(tmp_path / "ended.jsonl", ended)).max_tokens == 120
    for row in ended:
        del row["sampling"]
    found = read_recorded(write(tmp_path / "unknown.jsonl", ended))
    assert (found.max_tokens, found.sampling) == (30, {})


def test_what_cannot_be_measured_is_said_at_once(rollouts, tmp_path):
    rows = lines(rollouts)
    del rows[0]["token_ids"]
    rows[3]["messages"] = [{"role": "user", "content": "Something else?"}]
    with pytest.raises(EvaluationError) as error:
        read_recorded(write(tmp_path / "broken.jsonl", rows))
    assert f"1 prompts have completions without token_ids, such as {rows[0]['prompt_id']!r}" in str(error.value)
    assert f"1 prompt_ids stand for several prompts, such as {rows[2]['prompt_id']!r}" in str(error.value)
    rows = [{**row, "generator": name} for row, name in zip(lines(rollouts), "ababbbbb", strict=True)]
    with pytest.raises(EvaluationError, match="is of several generators: a, b"):
        read_recorded(write(tmp_path / "two.jsonl", rows))
    with pytest.raises(EvaluationError, match="has no completions"):
        read_recorded(write(tmp_path / "empty.jsonl", []))
    (tmp_path / "unfinished").mkdir()
    write(tmp_path / "unfinished" / "journal.jsonl", lines(rollouts))
    with pytest.raises(EvaluationError, match="sampling is not complete, the command that began it finishes it"):
        read_recorded(tmp_path / "unfinished")


def test_a_generator_that_nobody_has_needs_a_value_model(rollouts, tmp_path, capsys):
    file = write(tmp_path / "mine.jsonl", [{**row, "generator": "my-model"} for row in lines(rollouts)])
    command = ["--task", "length", "--rollouts", str(file), "--out", str(tmp_path / "results")]
    assert evaluate(command) == 2
    assert "--lenvm is missing" in capsys.readouterr().err
    words = ["--lenvm", "tiny-text-lenvm"]
    assert evaluate([*command, *words]) == 0  # whose folder has the tokenizer
    assert results(tmp_path / "results").provenance["generator"] == {"name": "my-model"}


def test_settings_that_would_do_nothing(rollouts, capsys):
    words = f"--task length --rollouts {rollouts} --n 4 --temperature 0.5 --data tiny-math"
    assert evaluate(words.split()) == 2
    assert "--data, --n, --temperature would do nothing" in capsys.readouterr().err


def test_in_a_recipe_nobody_has_to_say_who_wrote_them(rollouts):
    assert not needs_generator(read_settings({"task": "length", "rollouts": str(rollouts)}, "this"))
    assert needs_generator(read_settings({"task": "length"}, "this"))
