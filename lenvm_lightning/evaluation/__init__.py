"""What a generator does with and without a length value model: tasks, judging, statistics, reports.

`evaluate.evaluate` measures one task; `tasks` has one file for each of them.
"""

from importlib import import_module
from typing import Any

_WHERE = {"answers": "judge.answers", "lifebench": "tasks.lifebench"}
"""Names of design: `from lenvm_lightning.evaluation import answers, lifebench`."""


def __getattr__(name: str) -> Any:
    # Imported when somebody asks: a command line should not wait for what it does not need.
    if name in _WHERE:
        return import_module(f".{_WHERE[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
