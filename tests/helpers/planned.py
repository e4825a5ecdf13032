"""Steps of tiny models, run on tensors with or without memory."""

from modules import make_module
from torch._subclasses.fake_tensor import FakeTensorMode

from lenvm_lightning import TextLenVM
from lenvm_lightning.planning.dry_run import DryRun
from lenvm_lightning.planning.planned_model import build
from lenvm_lightning.planning.settings import BatchShape, PlanSettings

TEXT = BatchShape("text", 3, 96)
VISUAL = BatchShape("vision", 3, 64, (1, 8, 8), 16)
CPU = PlanSettings(gpu=False)


def run(module, shape, settings, fake=None):
    build(module, fake, settings)
    dry_run = DryRun(module, settings, fake)
    dry_run.optimizer_step()
    return dry_run.run(shape, shape.rows)


def tiny(module_class, **options):
    """A module of one layer."""
    backbone = "tiny-text" if module_class is TextLenVM else "tiny-vl"
    return make_module(module_class, backbone, gamma=0.99, keep_layers=1, **options)


def nothing():
    return FakeTensorMode(allow_non_fake_inputs=True)
