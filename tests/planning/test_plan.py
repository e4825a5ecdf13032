"""Planning: a step on tensors without memory takes, byte for byte, what the same step takes on real ones."""

import json

import pytest
import torch
from modules import make_module
from places import CONFIGS
from torch._subclasses.fake_tensor import FakeTensorMode

from lenvm_lightning import OptimizerConfig, TextLenVM, VisionLenVM
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.models.adapters import LoRA
from lenvm_lightning.planning.dry_run import NF4_BITS, DryRun
from lenvm_lightning.planning.memory_kinds import (
    BUCKETS,
    COPIES,
    GATHERED,
    GRADIENTS,
    LANGUAGE,
    MASTER,
    OPTIMIZER,
    RECOMPUTED,
    STATES,
    TEMPORARY,
    VISION,
    WEIGHTS,
)
from lenvm_lightning.planning.plan import on_one_device, plan
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


def test_a_precision_nobody_knows():
    with pytest.raises(RecipeError, match="transformer-engine"):
        PlanSettings("transformer-engine")


# -- command ----------------------------------------------------------------------------------------------------------


def test_numbers_that_cannot_be(capsys):
    assert main(["plan", "text_lenvm", "--row-tokens", "-5", "--tflops", "0"]) == 2
    assert "--row-tokens must be above 0, got -5; --tflops must be above 0, got 0.0" in capsys.readouterr().err


def test_command_on_a_real_config(capsys):
    """No weights and no rollouts are there; two of the layers are enough to see that all settings count."""
    folder = str(CONFIGS / "qwen2.5-1.5b-instruct")
    words = ["plan", "qwen2.5-1.5b", "--fit.model.backbone", folder, "--fit.model.backbone.keep_layers", "2", "--json"]
    assert main([*words, "--tflops", "100", "--tokens", "1e9"]) == 0
    found = json.loads(capsys.readouterr().out)
    layer = 1536 * (1536 + 2 * 256 + 1536) + (1536 + 2 * 256) + 3 * 1536 * 8960 + 2 * 1536
    assert found["parameters"][LANGUAGE] == {"trained": 2 * layer + 1536, "frozen": 0}
    assert found["parameters"]["embeddings"]["trained"] == 151_936 * 1536
    [batch] = found["batches"]
    assert batch["batch"]["rows"] == 32_768 // 3000
    assert batch["tokens_per_optimizer_step"] == 10 * 3000 * 32
    assert batch["recomputed_tflop"] > 0
    assert batch["training_h"] == pytest.approx(batch["optimizer_step_s"] * 1e9 / 960_000 / 3600)


def test_command_for_people(capsys):
    words = "--fit.trainer.devices 2 --fit.model.backbone.keep_layers 1"
    words += " --fit.data.layout shared --fit.data.completions_per_batch 4"
    assert main(["plan", "vlm_lenvm", *words.split()]) == 0
    text = capsys.readouterr().out
    for words in (
        "2 devices",
        "vision tower",
        "communication buckets",
        "most images",
        "image tokens",
        "Not counted",
        "layout: shared",
    ):
        assert words in text
    assert "51 x 80 tokens" in text  # 16 image tokens of the largest image that the processor leaves, and 64 beside


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lifebench"], "no fit stage"),
        (["tiny_text"], "TinyLanguageModel"),
        (["text_lenvm", "--fit.model.backbone", "/nowhere/at/all"], "config.json"),
        (["text_lenvm", "--fit.trainer.precision", "transformer-engine"], "cannot be planned"),
        (["text_lenvm", "--fit.model.rank", "3"], "rank"),
        (["vlm_lenvm", "--fit.model.backbone", "tiny-text"], "reads text only"),
    ],
)
def test_command_says_what_is_wrong(words, said, capsys):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err
