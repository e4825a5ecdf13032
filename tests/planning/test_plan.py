"""Plans: what more images take, what is frozen, and what each of several devices holds."""

import pytest
from planned import TEXT, VISUAL, nothing, run, tiny

from lenvm_lightning import TextLenVM, VisionLenVM
from lenvm_lightning.planning.memory_kinds import (
    BUCKETS,
    COPIES,
    GATHERED,
    GRADIENTS,
    MASTER,
    OPTIMIZER,
    STATES,
    VISION,
    WEIGHTS,
)
from lenvm_lightning.planning.plan import on_one_device, plan
from lenvm_lightning.planning.settings import BatchShape, PlanSettings


@pytest.mark.parametrize("freeze", [True, False])
def test_more_images_are_what_they_would_be_if_all_were_run(freeze):
    shape = BatchShape("vision", 5, 64, (1, 8, 8), 16)
    settings = PlanSettings("bf16-mixed", 2)
    [planned] = plan(tiny(VisionLenVM, freeze_vision=freeze), [shape], settings).steps
    module = tiny(VisionLenVM, freeze_vision=freeze)
    every = run(module, shape, settings, nothing())
    assert planned.flops == every.flops
    for phase in ("forward", "backward"):
        there = sum(every.memory[phase].values())
        assert sum(planned.memory[phase].values()) == pytest.approx(there, rel=1e-3)
    assert (planned.memory["forward"].get(VISION, 0.0) > 1e5) is not freeze


def test_frozen_vision_has_neither_gradient_nor_states():
    found = plan(tiny(VisionLenVM), [VISUAL], PlanSettings())
    vision = found.parameters[VISION]
    trained = sum(part.trained for part in found.parameters.values())
    assert vision.trained == 0 < vision.frozen
    memory = found.steps[0].memory[OPTIMIZER]
    assert memory[STATES] == 2 * memory[GRADIENTS] == 8 * trained
    assert memory[WEIGHTS] - memory[GRADIENTS] >= 4 * vision.frozen


@pytest.fixture(scope="module")
def alone():
    """A step on one device, as a function of (devices, strategy)."""
    module = tiny(TextLenVM)
    [step] = plan(module, [TEXT], PlanSettings("bf16-mixed", 2)).steps

    def on(devices=1, strategy="auto"):
        return on_one_device(step, module.model, False, PlanSettings("bf16-mixed", 2, devices, strategy)).memory

    return on


def test_data_parallel_devices_hold_everything_and_buckets(alone):
    for phase, memory in alone(4, "ddp_find_unused_parameters_true").items():
        assert memory.pop(BUCKETS) == memory[GRADIENTS]
        assert memory == alone()[phase]


@pytest.mark.parametrize(
    ("strategy", "divided"),
    [
        ("deepspeed_stage_1", [STATES]),
        ("deepspeed_stage_2", [STATES, GRADIENTS]),
        ("deepspeed_stage_3", [STATES, GRADIENTS, WEIGHTS]),
        ("fsdp", [STATES, GRADIENTS, WEIGHTS]),
    ],
)
def test_sharded_devices_hold_a_shard(alone, strategy, divided):
    sharded = alone(4, strategy)
    for phase, memory in alone().items():
        for kind in (WEIGHTS, GRADIENTS, STATES):
            assert sharded[phase][kind] == memory[kind] / (4 if kind in divided else 1)
        assert sharded[phase].get(MASTER, 0) == (memory[GRADIENTS] / 4 if strategy[-1] in "12" else 0)
    assert (GATHERED in sharded["forward"]) == (WEIGHTS in divided)
    assert alone()["forward"][COPIES] > 0


@pytest.mark.parametrize(("stage", "gone"), [(2, {STATES, MASTER}), (3, {STATES, MASTER, WEIGHTS})])
@pytest.mark.parametrize("devices", [1, 4])
def test_what_is_offloaded_is_not_on_the_device(alone, stage, gone, devices):
    here, there = alone(devices, f"deepspeed_stage_{stage}"), alone(devices, f"deepspeed_stage_{stage}_offload")
    for phase, memory in there.items():
        assert memory == {kind: nbytes for kind, nbytes in here[phase].items() if kind not in gone}
