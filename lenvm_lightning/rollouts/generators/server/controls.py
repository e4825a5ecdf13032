"""Controls of length as the research code's server takes them: per request, as ``custom_params``.

That server is a fork of SGLang with a length value model beside the generator (arXiv 2604.27039, its public code). Its
names are those of the paper's policies. What it does otherwise than `guidance`, read in its
``lvm_guided_sampling.py``: a target of N is compared with N - t and not with N - (t + 1), so texts end a token or two
later; lengths are made of values with a gamma of 0.997 unless the request names another; ``linear`` counts its scale
from 1; ``value_min`` is read only where there is no target (and not on its GPU path, which serves top_k).
"""

from typing import Any

from ....decoding.batched_controls import numbers_for_a_batch
from ....decoding.sampling_params import SamplingParams
from ....errors import GenerationError, GeneratorError
from ....guidance import AtLeast, AtMost, Control, EqualTo, Gated, Scale, Tilt
from .backends import Backend

_CONSTRAINTS = {EqualTo: "eq", AtMost: "le", AtLeast: "ge"}


def custom_params(control: Control, gamma: float | None = None) -> dict[str, Any]:
    """A control in the words of the research code's server.

    Args:
        control: `Tilt`, ``EqualTo``, ``AtMost`` or ``AtLeast`` in a mode of the
            paper, ``Scale``; inside ``Gated`` too, whose thresholds mean the same there (g of the expectation; nats of
            entropy). Numbers are plain ones.
        gamma: discount of the length value model that the server has; where None, it takes 0.997. It matters to
            ``EqualTo`` alone.

    Returns:
        JSON values.

    Raises:
        GenerationError: the server has no name for the control, or would not do what it says.
    """
    if gamma is not None and not 0 < gamma < 1:
        raise GenerationError(f"gamma must lie between 0 and 1, found {gamma!r}")
    if numbers_for_a_batch(control):
        raise GenerationError(f"control {control} has numbers for several rows: give each request a control of its own")
    params = _params(control)
    return params if gamma is None else {**params, "gamma": float(gamma)}


def _params(control: Any) -> dict[str, Any]:
    if isinstance(control, Gated):
        return _gated(control)
    if isinstance(control, Tilt):
        return {"value_mode": "centered_exp", "value_scale": float(control.beta)}
    if isinstance(control, Scale):
        return _scaled(control)
    if type(control) not in _CONSTRAINTS:
        known = "Tilt, EqualTo, AtMost, AtLeast, Scale, Gated"
        raise GenerationError(f"the research server has no name for the control {control!r}; it knows {known}")
    if control.mode == "penalty":
        modes = "mode='hard' or mode='soft'" if isinstance(control, EqualTo) else "mode='hard'"
        raise GenerationError(
            f"the research server has no name for the mode 'penalty' of {control}, which is this package's own: use "
            f"{modes} (the paper's) there, or a local generator (LocalGenerator with lenvm=...)"
        )
    constraint = "eq_soft" if control.mode == "soft" else _CONSTRAINTS[type(control)]
    return {"target_length": int(control.n), "target_length_mode": "total", "value_constraint": constraint}


def _scaled(control: Scale) -> dict[str, Any]:
    scale = float(control.scale)
    if control.kind == "mul" and scale == 0:
        raise GenerationError(
            f"the research server leaves the distribution as it is under {control}: use AtMost(n, mode='hard'), which "
            "takes the smallest value too"
        )
    if control.kind == "linear":  # there 0 is the smallest value offered, 1 the mean, 2 the largest
        scale += 1
    return {"value_mode": control.kind, "value_scale": scale}


def _gated(control: Gated) -> dict[str, Any]:
    """The control inside, and its thresholds; of gates within gates the higher ones. No g and no entropy is below 0."""
    params = _params(control.control)
    gates = {"value_min": float(control.min_g), "value_entropy_threshold": float(control.min_entropy)}
    gates = {name: max(least, params.get(name, 0.0)) for name, least in gates.items()}
    if gates["value_min"] > 0 and "target_length" in params:
        raise GenerationError(
            f"the research server reads no min_g where there is a target, as in {control}: leave it out, or use "
            "min_entropy"
        )
    return params | {name: least for name, least in gates.items() if least > 0}


class ControlFields:
    """What the controls of one run add to its requests.

    Args:
        backend: of the server.
        sampling: of the run.
        gamma: see `custom_params`.
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
                "would ignore it. Use server='research' for the research code's server, or a local generator "
                "(LocalGenerator with lenvm=...)."
            )
        params = {} if control is None else custom_params(control, self._gamma)
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
