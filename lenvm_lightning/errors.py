"""Errors for people: what was wrong, what was found, what to do next."""

import difflib
from collections.abc import Iterable


class LenVMError(Exception):
    """Base of all errors that a user can fix; command-line tools print its text without a traceback."""


class CheckpointError(LenVMError):
    """A model directory that is not, or not quite, a length value model."""


class RecipeError(LenVMError):
    """A recipe, or an override of one, that cannot be run."""


class DataError(LenVMError):
    """Rollouts that cannot be trained on."""


class GeneratorError(LenVMError):
    """A generator that cannot be loaded, reached, or asked any further."""


class ChatTemplateError(GeneratorError):
    """A chat template that does not come to an end: no other prompt would fare better."""


class GenerationError(LenVMError, ValueError):
    """Arguments of guided decoding that mean nothing or contradict each other."""


class StoreError(LenVMError):
    """A folder of completions that is in use, holds those of other settings, or cannot be written."""


class EvaluationError(LenVMError):
    """An evaluation that cannot be made as asked."""


def named(error: BaseException) -> str:
    """Kind and first line of an error of another library."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def reason_of(error: BaseException) -> str:
    """Why a prompt cannot be read: what a `ValueError` says, and of other errors their kind, too."""
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word: ``; did you mean 'x'?``, or an empty string where nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
