"""Results of an evaluation, token by token: each text beside what its system was asked."""

import json

import pytest

from lenvm_lightning.cli.evaluate import main as lenvm_eval
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import DataError
from lenvm_lightning.inspection.read import completions_of_results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "lb"
    command = ["--task", "lifebench", "--limit", "2", "--lengths", "16", "--constraints", "equal to", "--soften"]
    assert lenvm_eval([*command, "--out", str(folder)]) == 0
    return folder


def test_completions_of_a_prompt_follow_each_other_with_what_each_was_asked(results, capsys):
    written = list(completions_of_results(results))
    samples = [json.loads(line) for line in (results / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(written) == len(samples) == 8
    assert [one.name for one in written] == [
        f"{system} {number}" for system in ("base", "base", "ours", "ours") for number in (0, 1)
    ]
    asked = {one.name: one.prompt.messages[0]["content"] for one in written}
    assert "must be equal to 16" in asked["base 0"]
    assert "should be approximately 16" in asked["ours 0"]
    of_sample = {(s["prompt_id"], f"{s['system']} {s['number']}"): s["token_ids"] for s in samples}
    assert {(one.prompt.prompt_id, one.name): one.token_ids for one in written} == of_sample
    assert main(["inspect", str(results), "--limit", "3"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in told] == ["base 0", "base 1", "base 0"]


def test_the_report_says_how_and_a_page_comes_of_it(results, tmp_path):
    report = (results / "report.md").read_text(encoding="utf-8")
    assert "lenvm inspect THIS_FOLDER --lenvm tiny-text-lenvm --out page.html" in report
    assert main(["inspect", str(results), "--out", str(tmp_path / "page.html")]) == 0
    assert "should be approximately 16" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", "cannot be read as results of lenvm-eval: KeyError: 'prompt_id'"),
        ("nonsense", "cannot be read as results of lenvm-eval"),
        (None, r"holds no prompts.jsonl: its prompts have images"),
    ],
)
def test_what_is_no_folder_of_results_is_said(content, message, tmp_path):
    (tmp_path / "samples.jsonl").write_text("", encoding="utf-8")
    if content is not None:
        (tmp_path / "prompts.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(completions_of_results(tmp_path))
