"""The registry of tasks: built-in files are found by themselves, others can join, and nobody takes a name twice."""

import subprocess
import sys
from dataclasses import dataclass, fields

import pytest

from lenvm_lightning.evaluation import answers, lifebench, tasks
from lenvm_lightning.evaluation.read_settings import mistakes, read_settings
from lenvm_lightning.evaluation.settings import COMMON
from lenvm_lightning.evaluation.task import DataSource, Task
from lenvm_lightning.utils.settings import COUNT, NUMBER, setting


@dataclass(frozen=True)
class Own:
    depth: int = setting(COUNT, "how deep", 3)


@pytest.fixture
def own_task(monkeypatch):
    class OwnTask(Task):
        name = "own"
        settings = Own
        sources = (DataSource("mine", lambda settings: None),)

    tasks.names()
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    return OwnTask()


def test_built_in_tasks_are_found():
    expected = "ablation gsm8k length lifebench longbench-write math500 paper scaling tokens vqa"
    assert set(expected.split()) <= set(tasks.names())
    assert tasks.names() == sorted(tasks.names())
    assert all(tasks.get(name).name == name for name in tasks.names())
    assert not {field.name for name in tasks.names() for field in fields(tasks.get(name).settings)} & set(COMMON)


def test_a_task_of_ones_own(own_task):
    tasks.register(own_task)
    assert tasks.get("own") is own_task
    assert read_settings({"task": "own", "depth": 5}, "test").own == Own(5)
    assert dict(mistakes({"task": "own", "dept": 5})) == {
        "dept": "'dept' is no setting of a task; did you mean 'depth'?"
    }
    assert dict(mistakes({"task": "gsm8k", "depth": 5})) == {"depth": "depth is a setting of own, not of gsm8k"}
    assert own_task.source_of("anything.jsonl", "tiny-text").name == "mine"


def test_names_and_settings_are_taken_once(own_task):
    own_task.name = "gsm8k"
    with pytest.raises(ValueError, match="there is a task 'gsm8k' already"):
        tasks.register(own_task)

    @dataclass(frozen=True)
    class Taken:
        limit: int = setting(COUNT, "a common one", 3)
        lengths: float = setting(NUMBER, "read otherwise by lifebench", 3.0)

    own_task.name, own_task.settings = "own", Taken
    with pytest.raises(ValueError, match=r"every task has a setting 'limit'.*'lengths' of own is read in another way"):
        tasks.register(own_task)


def test_data_sources_are_chosen_by_generator_and_name():
    gsm8k = tasks.get("gsm8k")
    names = {
        (None, "tiny-text"): "tiny", (None, "Qwen/Q"): "paper", ("tiny", "Qwen/Q"): "tiny",
        ("tiny-math", "Qwen/Q"): "tiny", ("paper", "tiny-text"): "paper", ("test.jsonl", "tiny-text"): "paper",
    }  # fmt: skip
    assert {key: gsm8k.source_of(*key).name for key in names} == names


def test_what_design_names_is_reachable():
    assert answers.judge(r"\boxed{4}", "4")
    item = {"lang": "en", "task": "Use {word_count_type} {word_count} words."}
    assert lifebench.build_prompt(item, "at most", 7, soften=True) == "Use at most 7 tokens."
    assert lifebench.length_score(7, 7, "at most") == 100
    assert lifebench.length_deviation(6, 4) == 0.5


def test_a_command_line_is_built_without_torch():
    code = (
        "import sys; from lenvm_lightning.cli.evaluate import build_parser; build_parser().format_help(); "
        "print({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
