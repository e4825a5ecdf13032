"""A setting is declared once: kind, meaning and default go with the field."""

from dataclasses import dataclass

import pytest

from lenvm_lightning.utils.settings import (
    COUNT,
    NUMBER,
    OPTIONS,
    TEXT,
    describe,
    fields_of,
    misfits,
    require_fit,
    setting,
    setting_of,
)


@dataclass(frozen=True)
class Tea:
    leaves: int = setting(COUNT, "how many")
    heat: float = setting(NUMBER, "degrees", 90.0)
    name: str | None = setting(TEXT, "what it is called", None)

    def __post_init__(self):
        require_fit(self)


@dataclass(frozen=True)
class Pot:
    leaves: int = setting_of(Tea, "leaves", 3)
    heat: float = setting_of(Tea, "heat", meaning="of the pot")


def test_what_cannot_be_is_told_by_name():
    assert Tea(2).name is None
    with pytest.raises(ValueError, match="leaves must be") as told:
        Tea(0, "hot")
    assert str(told.value) == "leaves must be a whole number of at least 1, found 0; heat must be a number, found 'hot'"


def test_a_setting_of_another_dataclass_keeps_kind_and_meaning():
    assert (Pot().leaves, Pot().heat) == (3, 90.0)
    pot = fields_of(Pot)
    assert pot["leaves"].metadata == fields_of(Tea)["leaves"].metadata
    assert pot["heat"].metadata["meaning"] == "of the pot"


def test_missing_and_unknown_values_are_somebody_elses_matter():
    known = fields_of(Tea)
    assert list(misfits({"name": None, "sugar": 3}, known)) == []
    assert [key for key, _ in misfits({"leaves": True, "heat": float("inf")}, known)] == ["leaves", "heat"]


def test_help_names_what_is_required_and_the_defaults():
    told = describe(fields_of(Tea))
    assert "leaves  how many (required)" in told
    assert "degrees (default: 90.0)" in told


def test_options_are_mappings_by_name():
    assert OPTIONS.fits(OPTIONS.parse("{concurrency: 64}"))
    assert not OPTIONS.fits(OPTIONS.parse("[1, 2]"))
    assert not OPTIONS.fits({1: 2})
