"""``python -m lenvm_lightning``: the same as the command ``lenvm``."""

from .cli.main import lenvm

lenvm()
