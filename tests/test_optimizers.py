import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lenvm_lightning.optimizers import build_optimizer


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
