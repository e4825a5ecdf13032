"""Models that are planned: adapters, and weights of four bits that are not there."""

import pytest
import torch
from planned import TEXT, tiny

from lenvm_lightning import HeadConfig, OptimizerConfig, TextLenVM
from lenvm_lightning.models.adapters import LoRA
from lenvm_lightning.planning.dry_run import NF4_BITS, DryRun
from lenvm_lightning.planning.memory_kinds import (
    COPIES,
    GRADIENTS,
    LANGUAGE,
    OPTIMIZER,
    RECOMPUTED,
    STATES,
    TEMPORARY,
    WEIGHTS,
)
from lenvm_lightning.planning.plan import plan
from lenvm_lightning.planning.settings import PlanSettings


def test_adapters_and_four_bits():
    whole = tiny(TextLenVM)
    before = plan(whole, [TEXT], PlanSettings("bf16-mixed", 2))
    module = tiny(TextLenVM, lora=LoRA(rank=4), quantise="nf4", optimizer=OptimizerConfig("paged_adamw_8bit"))
    found = plan(module, [TEXT], PlanSettings("bf16-mixed", 2))
    linears = [m for m in whole.model.backbone.modules() if isinstance(m, torch.nn.Linear)]
    adapters, head = found.parameters["adapters"], found.parameters["value head"]
    assert adapters.trained == 4 * sum(m.in_features + m.out_features for m in linears)
    assert found.parameters[LANGUAGE].frozen == before.parameters[LANGUAGE].trained
    assert found.parameters["embeddings"].trained == 0
    matrices = sum(m.weight.numel() for m in linears)
    old, new = (p.steps[0].memory[OPTIMIZER] for p in (before, found))
    assert new[WEIGHTS] == pytest.approx(old[WEIGHTS] - (4 - NF4_BITS / 8) * matrices + 4 * adapters.trained)
    assert new[GRADIENTS] == 4 * (adapters.trained + head.trained)
    assert 2 * (adapters.trained + head.trained) < new[STATES] < 8 * (adapters.trained + head.trained)
    assert found.steps[0].memory["forward"].get(COPIES, 0.0) < before.steps[0].memory["forward"][COPIES] / 2


def test_four_bits_keep_what_bitsandbytes_keeps():
    """Beside a real step: weights but for their scales, one matrix unpacked, the same activations.

    Under autocast on a CPU, and only there, PEFT casts what goes into adapters first; a GPU is planned for.
    """
    options = {"lora": LoRA(), "quantise": "nf4", "dtype": "bfloat16", "gradient_checkpointing": True}
    settings = PlanSettings("bf16-mixed", 2, gpu=False)
    [planned] = plan(tiny(TextLenVM, **options), [TEXT], settings).steps
    module = tiny(TextLenVM, **options)
    module.configure_model()
    module.on_train_start()
    dry_run = DryRun(module, settings, None)
    dry_run.optimizer_step()
    real = dry_run.run(TEXT, 0)
    for phase in ("forward", "backward"):
        for kind in (GRADIENTS, STATES):
            assert planned.memory[phase][kind] == real.memory[phase][kind]
        for kind in (LANGUAGE, RECOMPUTED):
            there = real.memory[phase].get(kind, 0.0)
            assert 0.8 * there <= planned.memory[phase].get(kind, 0.0) <= there
        assert planned.memory[phase][WEIGHTS] == pytest.approx(real.memory[phase][WEIGHTS], rel=0.02)
        unpacked = 2 * 128 * 384
        extra = planned.memory[phase].get(TEMPORARY, 0.0) - real.memory[phase].get(TEMPORARY, 0.0)
        assert 0 <= extra <= unpacked


@pytest.mark.parametrize(("kind", "outputs"), [("bins", 32), ("quantiles", 32), ("discounts", 32)])
def test_a_distributional_head_counts(kind, outputs):
    width = 128  # of tiny-text, and so of the head
    alone, both = (
        plan(tiny(TextLenVM, head=HeadConfig(kind)), [TEXT], PlanSettings("32-true")) for kind in ("point", kind)
    )
    head = width * width + width + width * outputs + outputs
    assert both.parameters["value head"].trained - alone.parameters["value head"].trained == head
    old, new = (found.steps[0].memory["forward"] for found in (alone, both))
    assert new[WEIGHTS] - old[WEIGHTS] == 4 * head
