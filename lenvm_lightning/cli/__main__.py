"""``python -m lenvm_lightning.cli``: the command ``lenvm`` where no script of it is on the path."""

from .main import lenvm

lenvm()
