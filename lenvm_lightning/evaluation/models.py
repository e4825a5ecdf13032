"""The generator and the length value model of an evaluation, loaded when they are needed first."""

from dataclasses import replace
from typing import Any

from ..decoding.segments import why_not_until
from ..errors import EvaluationError
from ..models.processors import tokenizer_of
from ..rollouts.generators.interface import Generator
from ..rollouts.generators.local.loading import place_for, require_same_tokens
from ..rollouts.sample import is_vllm, model_of, open_generator
from .prepare import Prepared
from .rivals import WithFeedback
from .samples import System


class Models:
    """Loads each model once.

    Args:
        prepared: what is to be done.

    Attributes:
        gamma: discount of the length value model; None where there is none, or it is not loaded yet and nobody gave it.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._generator: Generator | None = None
        self._lenvm: Any = None
        self.gamma: float | None = prepared.settings.gamma

    def connect(self) -> dict[str, Any] | None:
        """Reach the server, and refuse controls that it does not take before anything is asked of it.

        Returns:
            What identifies its model; None for a local generator, which is loaded later.

        Raises:
            LenVMError: it cannot be reached, or does not take a control.
        """
        prepared = self._prepared
        if not prepared.server or prepared.recorded is not None:
            return None
        self._generator = open_generator(prepared.generator, **prepared.generator_options)
        meta = next(iter(prepared.questions.prompts)).meta
        for system in prepared.systems:
            if system.control is not None:
                sampling = replace(prepared.sampling, **system.sampling)
                self._generator.check(system.control(meta), sampling)  # type: ignore[attr-defined]
        return self._generator.fingerprint()

    def generator_for(self, system: System) -> Generator:
        """The generator, with a length value model where the system is guided.

        Raises:
            LenVMError: it cannot be loaded, or the length value model has another tokenizer.
        """
        prepared = self._prepared
        if self._generator is None:
            self._generator = open_generator(prepared.generator, **prepared.generator_options)
            if prepared.settings.lenvm is not None:
                tokenizer = tokenizer_of(self._generator.processor)  # type: ignore[attr-defined]
                require_same_tokens(tokenizer, prepared.settings.lenvm)
        if not prepared.server and not is_vllm(prepared.generator):  # vLLM loads its own
            self._generator.lenvm = self.lenvm() if system.guided else None  # type: ignore[attr-defined]
        if system.rival is not None and system.rival.kind == "feedback":
            return WithFeedback(self._generator, tokenizer_of(self.processor()))
        return self._generator

    def lenvm(self) -> Any:
        """The length value model; None where there is none.

        Raises:
            LenVMError: it cannot be loaded.
        """
        settings = self._prepared.settings
        if self._lenvm is None and settings.lenvm is not None:
            from ..models.dtypes import open_value_model

            self._lenvm = open_value_model(
                settings.lenvm,
                gamma=settings.gamma,
                dtype=settings.dtype,
                device=place_for(settings.device, settings.dtype),
                generator=model_of(self._prepared.generator),
            )
            self.gamma = self._lenvm.gamma
            self._require_its_end(self._lenvm.config.until)
        return self._lenvm

    def _require_its_end(self, until: str | None) -> None:
        """Refuse a length value model that counts to something else than what is measured, before anything is sampled.

        Raises:
            EvaluationError: it does.
        """
        prepared = self._prepared
        if until is not None and prepared.task.needs_lenvm:
            raise EvaluationError(
                f"{prepared.task.name} measures lengths of whole completions, and {prepared.settings.lenvm} counts to "
                f"{until!r}: name another length value model"
            )
        if prepared.server or is_vllm(prepared.generator):
            return
        meta = next(iter(prepared.questions.prompts)).meta
        tokenizer = tokenizer_of(self.processor())
        controls = [system.control(meta) for system in prepared.systems if system.control is not None]
        if problems := [told for one in controls if (told := why_not_until(one, until, tokenizer))]:
            raise EvaluationError("; ".join(dict.fromkeys(problems)))

    def processor(self) -> Any:
        """Tokenizer or processor of the generator's vocabulary."""
        found = getattr(self._generator, "processor", None)
        if found is not None:
            return found
        from ..models.processors import load_processor

        # A server's model writes in the vocabulary of the length value model.
        prepared = self._prepared
        source = prepared.tokenizer or prepared.settings.lenvm
        return load_processor((prepared.settings.options or {}).get("processor") or source or "")
