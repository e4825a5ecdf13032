"""Systems by the names that people type: the control of each, how it samples, and names that mean nothing."""

import pytest

from lenvm_lightning.errors import EvaluationError
from lenvm_lightning.evaluation.systems import budget_systems, constraint_systems
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Tilt

CONSTRAINTS = ("equal to", "at most", "at least")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ours", [EqualTo(64), AtMost(64), AtLeast(64)]),
        ("paper", [EqualTo(64, mode="hard"), AtMost(64, mode="hard"), AtLeast(64, mode="hard")]),
        ("paper-equal", [EqualTo(64, mode="hard")] * 3),
        ("soft", [EqualTo(64, mode="soft"), AtMost(64), AtLeast(64)]),
        ("tilt:-5", [Tilt(-5)] * 3),
    ],
)
def test_each_name_has_its_controls(name, expected):
    [system] = constraint_systems([name], {"min_p": 0.25})
    assert [system.control({"constraint": one, "target": 64}) for one in CONSTRAINTS] == expected
    assert system.sampling == {"min_p": 0.25}


def test_base_is_sampled_as_it_is_and_every_system_is_there_once():
    systems = constraint_systems(["base", "ours", "base"], {"min_p": 0.25})
    assert [(system.name, system.guided) for system in systems] == [("base", False), ("ours", True)]
    assert systems[0].sampling == {}


def test_systems_of_a_budget():
    base, unguided, tilted = budget_systems(["base", "base+min-p", "tilt:-5"])
    assert (base.sampling, unguided.sampling, tilted.sampling) == ({}, {"min_p": 0.01}, {"min_p": 0.01})
    assert [system.guided for system in (base, unguided, tilted)] == [False, False, True]


def test_names_that_mean_nothing_are_told_at_once():
    with pytest.raises(EvaluationError, match=r"(?s)'our'; did you mean 'ours'.*'tilt:x'") as told:
        constraint_systems(["our", "tilt:x", "ours"])
    assert "'ours'" in str(told.value)
    assert str(told.value).count("known: base, ours, paper, paper-equal, soft, or a control") == 2
