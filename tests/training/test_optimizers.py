import lightning as L
import pytest
import torch
from adapted import fit, text_data, text_module
from gradients import QUIET, ROWS, FixedSplit
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from modules import make_module

from lenvm_lightning import TextLenVM
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.training.optimizers import (
    CompensatedAdamW,
    OptimizerConfig,
    build_optimizer,
    join,
    optimizer_and_schedule,
    split,
)


def test_fused_adamw_lets_gradients_be_clipped_under_bf16_mixed():
    """Every recipe clips; Lightning would refuse to at the first step."""
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    plugin = MixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(RuntimeError, match="fused"):
        plugin.clip_gradients(torch.optim.AdamW([weight], fused=True), 1.0)
    optimizer = build_optimizer("adamw", [{"params": [weight]}], "bf16-mixed", lr=0.1)
    assert optimizer.param_groups[0]["fused"]
    plugin.clip_gradients(optimizer, 1.0)
    assert weight.grad.norm() == pytest.approx(1.0, rel=1e-4)
    optimizer.step()
    assert weight.detach().tolist() == pytest.approx([-0.1] * 4, rel=1e-3)


def descend(start, dtype, adam, gradients, lr=2e-5):
    """Weights after a step along each of the gradients, and their optimizer."""
    weight = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = adam([weight], lr=lr, betas=(0.9, 0.999), weight_decay=0.1, fused=True)
    for gradient in gradients:
        weight.grad = gradient.to(dtype)
        optimizer.step()
    return weight.detach(), optimizer


@pytest.fixture(scope="module")
def gradients():
    """Of 300 steps: a slope that steadily points one way, and noise; as bfloat16 has them."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(64, 32, generator=generator)
    noise = torch.randn(300, 64, 32, generator=generator)
    return (slope + noise).bfloat16().float()


@pytest.fixture(scope="module")
def start():
    """Weights of all sizes, from those of matrices to those of norms and beyond."""
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-4, 1, 64)[:, None]
    return (torch.randn(64, 32, generator=generator) * size).bfloat16().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compensated_adamw_is_adamw_where_nothing_is_lost(start, gradients, dtype):
    expected, plain = descend(start, dtype, torch.optim.AdamW, gradients[:20])
    found, optimizer = descend(start, dtype, CompensatedAdamW, gradients[:20])
    assert torch.equal(found, expected)
    (state,), (there,) = optimizer.state.values(), plain.state.values()
    assert all(torch.equal(state[name], there[name]) for name in there)
    assert set(state) == set(there)


@pytest.mark.parametrize("lr", [1e-3, 2e-5, 1e-7])
def test_compensated_adamw_in_bfloat16_takes_the_steps_of_float32(start, gradients, lr):
    exact, _ = descend(start, torch.float32, torch.optim.AdamW, gradients, lr)
    found, optimizer = descend(start, torch.bfloat16, CompensatedAdamW, gradients, lr)
    plain, _ = descend(start, torch.bfloat16, torch.optim.AdamW, gradients, lr)
    (state,) = optimizer.state.values()
    assert torch.equal(join(found, state["rest"]), exact)
    assert float((found == exact.bfloat16()).float().mean()) > 0.99  # the nearest there is, but for ties
    assert float((plain.float() - exact).norm()) > 0.3 * float((exact - start).norm())  # what is lost otherwise


def test_numbers_are_split_and_joined():
    numbers = torch.tensor([0.0, -0.0, 1.0, 1.00390625, -1.00390625, 3.0e38, 1e-40, float("inf"), -float("inf")])
    numbers = torch.cat([numbers, torch.randn(10_000, generator=torch.Generator().manual_seed(2))])
    nearest, rest = split(numbers)
    assert torch.equal(join(nearest, rest), numbers)
    assert nearest[3:5].tolist() == [1.0078125, -1.0078125]  # half-way: away from zero
    assert float((nearest == numbers.bfloat16()).float().mean()) > 0.999
    nearest, rest = split(torch.tensor([float("nan")]))
    assert join(nearest, rest).isnan().all()


def test_compensated_adamw_goes_on_from_its_state(start, gradients, tmp_path):
    through, _ = descend(start, torch.bfloat16, CompensatedAdamW, gradients[:20])
    half, optimizer = descend(start, torch.bfloat16, CompensatedAdamW, gradients[:10])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    weight = torch.nn.Parameter(half.clone())
    resumed = CompensatedAdamW([weight], lr=1.0, fused=True)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for gradient in gradients[10:20]:
        weight.grad = gradient.bfloat16()
        resumed.step()
    assert torch.equal(weight.detach(), through)
    assert {name: value.dtype for name, value in resumed.state[weight].items() if name != "step"} == {
        "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "rest": torch.int16
    }  # fmt: skip


def test_states_of_another_optimizer_are_refused(start, gradients):
    _, plain = descend(start, torch.bfloat16, torch.optim.AdamW, gradients[:2])
    resumed = CompensatedAdamW([torch.nn.Parameter(start.bfloat16())])
    with pytest.raises(CheckpointError, match="an AdamW that was not compensated"):
        resumed.load_state_dict(plain.state_dict())


def test_what_is_trained_in_half_precision_is_compensated():
    weights = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    kinds = [type(build_optimizer("adamw", [{"params": weights[:n]}], "bf16-true", lr=0.1)) for n in (1, 2)]
    assert kinds == [torch.optim.AdamW, CompensatedAdamW]


def test_settings_of_the_optimizer_that_cannot_be_are_all_told():
    assert OptimizerConfig().problems() == []
    found = OptimizerConfig("sgd", lr=0.0, weight_decay=-1.0, betas=(0.9, 1.0), warmup_steps=-1).problems()
    names = ["kind", "lr", "weight_decay", "warmup_steps", "betas"]
    assert [problem.split()[0] for problem in found] == [f"optimizer.{name}" for name in names]


@pytest.mark.parametrize(("warmup_steps", "expected"), [(4, 4), (0.5, 5), (100, 10), (0, 0)])
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_decay_is_on_matrices_and_warmup_may_be_a_share(warmup_steps, expected):
    matrix, bias, frozen = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,), (2, 2)))
    frozen.requires_grad_(False)
    config = OptimizerConfig(lr=1.0, weight_decay=0.1, betas=(0.5, 0.6), warmup_steps=warmup_steps)
    optimizer, schedule = optimizer_and_schedule(config, [matrix, bias, frozen], "32-true", steps=10)
    decayed, plain = optimizer.param_groups
    assert (decayed["params"], decayed["weight_decay"], decayed["betas"]) == ([matrix], 0.1, (0.5, 0.6))
    assert (plain["params"], plain["weight_decay"]) == ([bias], 0.0)
    rates = []
    for _ in range(11):
        rates.append(plain["lr"])
        schedule.step()
    assert rates[: expected + 1] == pytest.approx([step / max(1, expected) for step in range(expected)] + [1.0])
    assert rates[-1] == pytest.approx(0.0 if expected < 10 else 1.0, abs=1e-12)


def test_no_step_of_a_half_precision_run_is_lost(text_rollouts):
    """One too small for bfloat16: the head takes it, and the rests of the backbone's matrices."""
    model = make_module(TextLenVM, "tiny-text", gamma=0.97, lr=1e-6, warmup_steps=0)
    before = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({name: p.detach().clone() for name, p in pl_module.model.named_parameters()})

    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", precision="bf16-true", callbacks=[Look()], limit_val_batches=0, **QUIET
    )
    trainer.fit(model, FixedSplit(text_rollouts, [list(range(ROWS))]))
    states = trainer.optimizers[0].state
    moved, kept = {}, {}
    for name, p in model.model.named_parameters():
        if p.ndim >= 2:
            moved[name] = float((p.detach() != before[name]).float().mean())
            kept[name] = float((states[p]["rest"] != 0).float().mean()) if "rest" in states[p] else None
    head = [share for name, share in moved.items() if name.startswith("v_head")]
    inside = [share for name, share in moved.items() if "layers" in name]
    assert min(head) > 0.5 > 0.1 > max(inside)
    assert {name for name, share in kept.items() if share is None} == {n for n in kept if n.startswith("v_head")}
    assert min(share for name, share in kept.items() if "layers" in name) > 0.9


def test_half_precision_that_learns_little_warns(text_rollouts):
    model = TextLenVM("tiny-text", gamma=0.97, optimizer=OptimizerConfig("adamw_8bit"))
    trainer = L.Trainer(max_steps=1, accelerator="cpu", precision="bf16-true", limit_val_batches=0, **QUIET)
    with pytest.warns(match=r"bf16-true with optimizer\.kind: adamw_8bit .* use optimizer\.kind: adamw"):
        trainer.fit(model, FixedSplit(text_rollouts, [list(range(ROWS))]))


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_in_eight_bits(text_rollouts, kind):
    module = fit(
        text_module(optimizer=OptimizerConfig(kind, lr=1e-3, warmup_steps=0)), text_data(text_rollouts), steps=2
    )
    state = module.trainer.optimizers[0].state
    moments = {parameter.numel() >= 4096: entry["state1"].dtype for parameter, entry in state.items()}
    assert moments == {True: torch.uint8, False: torch.float32}


def test_adamw_is_fused_where_gradients_can_still_be_divided_before(text_rollouts):
    module = fit(text_module(), text_data(text_rollouts), steps=1)
    assert module.trainer.optimizers[0].defaults["fused"]
    groups = [{"params": list(module.parameters())}]
    assert not build_optimizer("adamw", groups, "16-mixed", lr=1.0).defaults["fused"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_settings_are_finite(number):
    found = OptimizerConfig("adamw", number, number, (0.9, number), number).problems()
    assert [text.partition(" ")[0] for text in found] == [
        "optimizer.lr", "optimizer.weight_decay", "optimizer.warmup_steps", "optimizer.betas",
    ]  # fmt: skip
