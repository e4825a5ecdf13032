"""Who predicts distributions in the `length` task: the length value model, and what is easy to have beside it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..distributions.length_distribution import LengthDistribution, lognormal
from ..models.value_model import LengthValueModel
from ..rollouts.generators.interface import Prompt
from .interval_scores import IntervalReport, IntervalScores, Quantile
from .samples import Sample
from .simple_distributions import ConstantDistribution, QuantileRegression
from .simple_predictors import known_completions
from .task import Measured

_OURS = "LenVM"
_MOST_DOMAINS = 12  # more are names of single prompts

Predict = Callable[[Tensor], tuple[LengthDistribution, Quantile]]


class IntervalPredictors:
    """Scores of each predictor by its name, the length value model first; none where it does not say how sure it is.

    Args:
        lenvm: the length value model.
        prompts: that were asked, by their ids.
        constant: what knows the tokens written alone; None without rollouts to learn from.
        regression: what knows the length of the prompt, too.
    """

    def __init__(
        self,
        lenvm: LengthValueModel,
        prompts: dict[str, Prompt],
        constant: ConstantDistribution | None,
        regression: QuantileRegression | None,
    ) -> None:
        self._lenvm, self._prompts, self._constant, self._regression = lenvm, prompts, constant, regression
        self._scores: dict[str, IntervalScores] = {}
        domains = {_domain(prompt) for prompt in prompts.values()}
        self._one_domain = len(domains) > _MOST_DOMAINS

    def add(self, sample: Sample, outputs: Tensor, limit: int) -> None:
        """Add a completion.

        Args:
            sample: with token ids.
            outputs: of all heads at its states. Shape (L + 1, 1 + K).
            limit: tokens at most of a completion.
        """
        prompt = self._prompts[sample.prompt_id]
        for name, predict in self._predictors(prompt, outputs).items():
            scores = self._scores.setdefault(name, IntervalScores())
            domain = "all" if self._one_domain else _domain(prompt)
            scores.add(sample.prompt_id, domain, len(outputs) - 1, sample.truncated, limit, predict)

    def compute(self) -> dict[str, IntervalReport]:
        """The scores of each predictor, ours first."""
        return {name: scores.compute() for name, scores in self._scores.items()}

    def _predictors(self, prompt: Prompt, outputs: Tensor) -> dict[str, Predict]:
        lenvm, constant, regression = self._lenvm, self._constant, self._regression
        calibration = lenvm.config.intervals
        if lenvm.length_rule is None and calibration is None:
            return {}

        def ours(written: Tensor) -> tuple[LengthDistribution, Quantile]:
            some = outputs[written]
            return lenvm.distribution(some), lambda q: lenvm.quantile(some, q, written)

        def around_value(written: Tensor) -> tuple[LengthDistribution, Quantile]:
            assert calibration is not None
            found = lognormal(lenvm.remaining(outputs[written, 0]), calibration.spread)
            return found, found.quantile

        def as_it_is(found: LengthDistribution) -> tuple[LengthDistribution, Quantile]:
            return found, found.quantile

        predictors: dict[str, Predict] = {_OURS: ours}
        if lenvm.length_rule is not None and calibration is not None:
            predictors["log-normal around the value"] = around_value
        if constant is not None:
            predictors["constant"] = lambda written: as_it_is(constant.predict(written))
        if regression is not None:
            predictors["quantile regression"] = lambda written: as_it_is(regression.predict(prompt, written))
        return predictors


def interval_predictors(measured: Measured) -> IntervalPredictors:
    """Of an evaluation; simple ones learn from the rollouts that `--learn-from` names.

    Raises:
        DataError: these are too few.
    """
    assert measured.lenvm is not None
    prompts = {prompt.prompt_id: prompt for prompt in map(measured.prompts.__getitem__, range(len(measured.prompts)))}
    learn_from = measured.settings.own.learn_from
    if learn_from is None:
        return IntervalPredictors(measured.lenvm, prompts, None, None)
    known = known_completions(Path(learn_from))
    with torch.no_grad():
        regression = QuantileRegression(measured.processor, known)
    return IntervalPredictors(measured.lenvm, prompts, ConstantDistribution(known), regression)


def _domain(prompt: Prompt) -> str:
    """What a prompt is about, as its source or its id says."""
    return str(prompt.meta.get("source") or prompt.prompt_id.rpartition("/")[0] or prompt.prompt_id)
