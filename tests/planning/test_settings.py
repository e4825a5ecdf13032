"""Settings of a plan."""

import pytest

from lenvm_lightning.errors import RecipeError
from lenvm_lightning.planning.settings import PlanSettings


def test_a_precision_nobody_knows():
    with pytest.raises(RecipeError, match="transformer-engine"):
        PlanSettings("transformer-engine")
