"""`lenvm-eval` as people type it: mistakes are told in a sentence."""

import re

import pytest

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.evaluate import main

MISTAKES = {
    "--task lifebench --systems base paper-equl": r"'paper-equl'; did you mean 'paper-equal'\?",
    "--task gsm8k --systems base ours": r"'ours'.*known: base, base\+min-p, countdown:N, feedback:N, or a control",
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
