"""Who predicts distributions in the `length` task: the length value model, and what is easy to have beside it."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..distributions.length_distribution import LengthDistribution, lognormal
from ..models.value_model import LengthValueModel
from ..rollouts.generators.interface import Prompt
from .interval_scores import IntervalReport, IntervalScores, Quantiles
from .samples import Sample
from .simple_distributions import ConstantDistribution, QuantileRegression
from .simple_predictors import Completion
from .task import Measured, prompt_by_id

_OURS = "LenVM"

Predict = Callable[[Tensor], tuple[LengthDistribution, Quantiles]]


class IntervalPredictors:
    """Scores of each predictor by its name, the length value model first; none where it does not say how sure it is.

    Args:
        lenvm: the length value model.
        prompt_of: finds a prompt by its id.
        constant: what knows the tokens written alone; None without rollouts to learn from.
        regression: what knows the length of the prompt, too.
    """

    def __init__(
        self,
        lenvm: LengthValueModel,
        prompt_of: Callable[[str], Prompt],
        constant: ConstantDistribution | None,
        regression: QuantileRegression | None,
    ) -> None:
        self._lenvm, self._prompt_of, self._constant, self._regression = lenvm, prompt_of, constant, regression
        self._scores: dict[str, IntervalScores] = {}

    def add(self, sample: Sample, outputs: Tensor, limit: int) -> None:
        """Add a completion.

        Args:
            sample: with token ids.
            outputs: of all heads after so many tokens of `WRITTEN` as it has. Shape (N, 1 + K).
            limit: tokens at most of a completion.
        """
        if not self._lenvm.says_how_sure:
            return
        prompt = self._prompt_of(sample.prompt_id)
        assert sample.token_ids is not None
        for name, predict in self._predictors(prompt, outputs).items():
            scores = self._scores.setdefault(name, IntervalScores())
            scores.add(sample.prompt_id, _domain(prompt), len(sample.token_ids), sample.truncated, limit, predict)

    def compute(self) -> dict[str, IntervalReport]:
        """The scores of each predictor, ours first."""
        return {name: scores.compute() for name, scores in self._scores.items()}

    def _predictors(self, prompt: Prompt, outputs: Tensor) -> dict[str, Predict]:
        lenvm, constant, regression = self._lenvm, self._constant, self._regression
        calibration = lenvm.config.intervals

        def ours(written: Tensor) -> tuple[LengthDistribution, Quantiles]:
            return lenvm.distribution(outputs), lambda levels: lenvm.quantiles(outputs, levels, written)

        predictors: dict[str, Predict] = {_OURS: ours}
        if lenvm.length_rule is not None and calibration is not None:
            around = lognormal(lenvm.remaining(outputs[:, 0]), calibration.spread)
            predictors["log-normal around the value"] = lambda written: _as_it_is(around)
        if constant is not None:
            predictors["constant"] = lambda written: _as_it_is(constant.predict(written))
        if regression is not None:
            predictors["quantile regression"] = lambda written: _as_it_is(regression.predict(prompt, written))
        return predictors


def _as_it_is(found: LengthDistribution) -> tuple[LengthDistribution, Quantiles]:
    """A distribution with its own quantiles."""
    return found, found.quantiles


def interval_predictors(measured: Measured, known: Sequence[Completion] | None) -> IntervalPredictors:
    """Of an evaluation.

    Args:
        measured: samples and length value model.
        known: completions that simple predictors learn from; None: there are none of these.

    Raises:
        DataError: completions that are too few.
    """
    assert measured.lenvm is not None
    prompt_of = prompt_by_id(measured)
    if known is None:
        return IntervalPredictors(measured.lenvm, prompt_of, None, None)
    regression = QuantileRegression(measured.processor, known)
    return IntervalPredictors(measured.lenvm, prompt_of, ConstantDistribution(known), regression)


def _domain(prompt: Prompt) -> str:
    """What a prompt is about, as its source or its id says."""
    return str(prompt.meta.get("source") or prompt.prompt_id.rpartition("/")[0] or prompt.prompt_id)
