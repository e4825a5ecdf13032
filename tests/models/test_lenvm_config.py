import pytest

from lenvm_lightning.models.lenvm_config import LenVMConfig


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gamma": 1.0}, "gamma must be a number strictly between 0 and 1; got 1.0"),
        ({"gamma": "auto"}, "gamma"),
        ({"gamma": 0.9, "target": "lenght"}, "target must be one of discounted"),
        ({"gamma": 0.9, "length_scale": 0.0}, "scale must be positive"),
    ],
)
def test_config_that_means_nothing(settings, text):
    with pytest.raises(ValueError, match=text):
        LenVMConfig(**settings)
