"""Dry runs: a step on tensors without memory takes, byte for byte, what the same step takes on real ones."""

import pytest
from planned import CPU, TEXT, VISUAL, nothing, run, tiny

from lenvm_lightning import TextLenVM, VisionLenVM
from lenvm_lightning.planning.memory_kinds import GRADIENTS, LANGUAGE, OPTIMIZER, RECOMPUTED, STATES, TEMPORARY, WEIGHTS
from lenvm_lightning.planning.plan import plan
from lenvm_lightning.planning.settings import BatchShape, PlanSettings


@pytest.mark.parametrize(
    ("module_class", "shape", "settings", "options"),
    [
        (TextLenVM, TEXT, CPU, {}),
        (TextLenVM, TEXT, PlanSettings("bf16-mixed", 4), {"gradient_checkpointing": True, "lam": 0.9}),
        (VisionLenVM, VISUAL, PlanSettings("bf16-true", gpu=False), {}),
        (VisionLenVM, VISUAL, CPU, {"freeze_vision": False, "gradient_checkpointing": True}),
    ],
    ids=["text", "text-mixed-checkpointing", "vision-halved", "vision-trained-checkpointing"],
)
def test_a_step_without_memory_is_the_real_one(module_class, shape, settings, options):
    fake = run(tiny(module_class, **options), shape, settings, nothing())
    real = run(tiny(module_class, **options), shape, settings)
    assert fake.memory == real.memory
    assert fake.flops == real.flops
    assert real.memory["forward"][LANGUAGE] > 0
    assert ("recompute" in real.flops) == bool(options.get("gradient_checkpointing"))


@pytest.fixture(scope="module")
def text():
    """A plan of the tiny text model, and its parameters."""
    module = tiny(TextLenVM)
    [step] = plan(module, [TEXT], PlanSettings(accumulate=2)).steps
    return step, module.model


def test_the_parts_that_stay(text):
    step, model = text
    count = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    for memory in step.memory.values():
        assert memory[WEIGHTS] == 4 * count + buffers
        assert memory[GRADIENTS] == 4 * count
        assert memory[STATES] == 8 * count  # two moments
    assert step.memory[OPTIMIZER].get(TEMPORARY, 0.0) < 1e4  # a fused step makes nothing


def test_an_optimizer_that_is_not_fused_makes_roots_of_all_moments_at_once_on_a_gpu():
    matrices = 196_608 + 262_144 + 128**2 + 128
    for gpu, least in ((True, 4 * matrices), (False, 4 * 262_144)):
        [step] = plan(tiny(TextLenVM), [TEXT], PlanSettings("16-mixed", 2, gpu=gpu)).steps
        assert least <= step.memory[OPTIMIZER][TEMPORARY] < 2.1 * least


def test_operations_by_hand(text):
    step, model = text
    embedding = model.backbone.get_input_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and p is not embedding)
    config = model.backbone.config
    attention = 4 * TEXT.length * config.hidden_size * config.num_hidden_layers  # scores and their sums of values
    assert step.flops["forward"] == TEXT.tokens * (2 * matrices + attention)
    # Backward: two products for each of the forward pass, and attention makes its scores once more.
    assert 2.0 <= step.flops["backward"] / step.flops["forward"] < 2.2


def test_activations_grow_with_rows_and_checkpointing_keeps_few():
    def activations(shape, **options):
        [step] = plan(tiny(TextLenVM, **options), [shape], PlanSettings()).steps
        return step

    one, two = activations(TEXT), activations(BatchShape("text", 6, 96))
    assert two.memory["forward"][LANGUAGE] / one.memory["forward"][LANGUAGE] == pytest.approx(2, rel=0.01)
    saving = activations(TEXT, gradient_checkpointing=True)
    assert saving.memory["forward"][LANGUAGE] < 0.6 * one.memory["forward"][LANGUAGE]  # four layers only
    assert saving.memory["backward"][RECOMPUTED] > 0
    assert 0.5 < saving.flops["recompute"] / saving.flops["forward"] < 1.0
    assert saving.flops["forward"] == one.flops["forward"]
