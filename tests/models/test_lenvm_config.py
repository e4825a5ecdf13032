import math

import pytest

from lenvm_lightning.models.lenvm_config import LenVMConfig


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gamma": 1.0}, "gamma must be a number strictly between 0 and 1; got 1.0"),
        ({"gamma": "auto"}, "gamma"),
        ({"gamma": 0.9, "target": "lenght"}, "target must be one of discounted"),
        ({"gamma": 0.9, "length_scale": 0.0}, "scale must be positive"),
        ({"gamma": 0.9, "length_scale": "1"}, "length_scale must be a number; got '1'"),
        ({"gamma": 0.9, "length_scale": math.inf}, "length_scale must be a number"),
        ({"gamma": 0.9, "dropout": "x", "backbone": 3}, "backbone must be a text or null; dropout must be a number"),
        ({"gamma": 0.9, "rollouts": [1]}, "rollouts must be an object"),
        ({"gamma": 0.9, "rollouts": {"generators": ["x"]}}, "rollouts must be an object, its generators one"),
        ({"gamma": 0.9, "base": {"dtype": "load"}}, "base must be an object that says dtype"),
        ({"gamma": 0.9, "base": {"quantise": "all"}}, "base must be"),
        ({"gamma": 0.9, "base": {"keep_layers": True}}, "base must be"),
        ({"gamma": 0.9, "base": []}, "base must be"),
        ({"gamma": 0.9, "until": ""}, "until must be a text or null"),
        ({"gamma": 0.9, "until": 3}, "until must be a text or null"),
    ],
)
def test_config_that_means_nothing(settings, text):
    with pytest.raises(ValueError, match=text):
        LenVMConfig(**settings)
