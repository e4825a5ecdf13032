"""Controls of length in the requests of a run, where a server takes them."""

from typing import Any

from ....decoding.control_text import control_as_text
from ....decoding.custom_params import write_custom_params
from ....decoding.sampling_params import SamplingParams
from ....errors import GeneratorError
from ....guidance import Control
from .backends import Backend


class ControlFields:
    """What the controls of one run add to its requests.

    Args:
        backend: of the server.
        sampling: of the run.
        gamma: see `write_custom_params`.
    """

    def __init__(self, backend: Backend, sampling: SamplingParams, gamma: float | None = None) -> None:
        self._backend, self._sampling, self._gamma = backend, sampling, gamma
        self._kinds: dict[str, Any] = {}  # of controls so far, and the first of each

    def of(self, control: Control | None) -> dict[str, Any]:
        """Fields beside the standard ones; none without a control.

        Raises:
            GeneratorError: the server takes no controls, or not with these settings, or not beside the run's others.
            GenerationError: it has no name for this one.
        """
        if control is not None and not self._backend.controls:
            raise GeneratorError(
                f"control {control}: a server of kind {self._backend.name!r} has no length value model beside it and "
                "would ignore it. Use server='lenvm' for `lenvm serve`, 'vllm-lenvm' for a vLLM with our processor, "
                "server='research' for the research code's server, or a local generator (LocalGenerator with "
                "lenvm=...)."
            )
        if self._backend.controls in ("lenvm", "vllm_xargs"):
            if control is None:
                return {}
            told = {"lenvm": control_as_text(control)}
            return told if self._backend.controls == "lenvm" else {"vllm_xargs": told}
        params = {} if control is None else write_custom_params(control, self._gamma)
        if self._backend.controls:
            kind = "target" if "target_length" in params else params.get("value_mode", "none")
            self._require_obeyed(kind, control)
        return {"custom_params": params} if params else {}

    def _require_obeyed(self, kind: str, control: Control | None) -> None:
        """Refuse what the server would do otherwise without saying so, or stop at."""
        sampling = self._sampling
        if kind != "none" and sampling.temperature == 0:
            raise GeneratorError(
                f"the research server does not guide at temperature 0, so it would ignore {control}: use a temperature "
                "above 0 (with top_k)"
            )
        if kind == "centered_exp" and not sampling.top_k:
            raise GeneratorError(f"the research server tilts only among top_k candidates: set top_k for {control}")
        self._kinds.setdefault(kind, control)
        if len(self._kinds) > 1:
            kinds = " and ".join(str(first) for first in self._kinds.values())
            raise GeneratorError(
                "the research server does as it is told only where all requests of a batch have the same kind of "
                f"control, but here are {kinds}: sample them one kind after the other"
            )
