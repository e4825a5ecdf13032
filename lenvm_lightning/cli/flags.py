"""Command-line flags of settings: kind, meaning and default are read from the field that declares the setting."""

import argparse
from dataclasses import MISSING, Field
from typing import Any

from ..utils.settings import fields_of

ALLOW_IMAGES_FROM: dict[str, Any] = {
    "action": "append",
    "metavar": "DIR",
    "help": "a folder from which images that rows name may be opened, beside that of the data; may be given again",
}


def add_setting(
    parser: argparse._ActionsContainer,
    setting: Field[Any],
    *,
    flag: str | None = None,
    default: Any = MISSING,
    **more: Any,
) -> None:
    """Add the flag of a setting.

    A setting without a default is required.

    Args:
        parser: or a group of one.
        setting: a field made by `utils.settings.setting`.
        flag: where it is not ``--NAME``.
        default: where it is not the setting's own.
        more: for ``add_argument``: ``action="append"``, ``nargs="+"``, another ``help``, ``required``.
    """
    own_default = setting.default if default is MISSING else default
    told = "" if own_default in (None, MISSING, (), []) else f" (default: {own_default})"
    meaning = more.pop("help", setting.metadata["meaning"])
    parser.add_argument(
        flag or f"--{setting.name.replace('_', '-')}",
        dest=setting.name,
        metavar=more.pop("metavar", setting.name.upper()),
        type=setting.metadata["kind"].parse,
        default=None if default is MISSING else default,
        required=more.pop("required", setting.default is MISSING),
        help=(meaning + told).replace("%", "%%"),
        **more,
    )


def add_allow_import(parser: argparse._ActionsContainer) -> None:
    """Add the flag that names packages whose classes a recipe may name."""
    parser.add_argument(
        "--allow-import",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="import classes of this package, too, where the recipe names them; may be given again. To import code is "
        "to run it: do so where you trust it",
    )


def add_settings(parser: argparse._ActionsContainer, owner: type, *names: str) -> None:
    """Add flags of several settings of a dataclass, all of its own names and defaults."""
    known = fields_of(owner)
    for name in names:
        add_setting(parser, known[name])
