"""What a value model may be built on, and what of it cannot be."""

import pytest

from lenvm_lightning.models.backbone_config import BackboneConfig


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"overrides": {"num_hidden_layers": 1}}, "backbone.overrides change the shape"),
        ({"keep_layers": 0}, "backbone.keep_layers must be at least 1, got 0"),
        ({"keep_layers": 2, "pretrained": False}, "backbone.keep_layers cuts pretrained weights"),
        ({"dtype": "half"}, "backbone.dtype must be one of float32, bfloat16, float16, float64; got half"),
        ({"quantise": "int8"}, "backbone.quantise must be nf4 or null; got int8"),
        ({"quantise": "nf4", "dtype": "float64"}, "backbone.quantise: nf4 computes in float32"),
    ],
)
def test_what_cannot_be_is_told(settings, problem):
    (found,) = BackboneConfig("tiny-text", **settings).problems()
    assert found.startswith(problem)


def test_what_can_be():
    assert BackboneConfig("tiny-text").problems() == []
    assert BackboneConfig("x", pretrained=False, overrides={"a": 1}, dtype="bfloat16").problems() == []
    assert BackboneConfig("x", keep_layers=2, quantise="nf4").problems() == []
