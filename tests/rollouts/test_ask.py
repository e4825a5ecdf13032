"""Asking a generator for what is missing: every answer kept before the next, and a stop that says what stays."""

from dataclasses import replace

import pytest
from sampled import open_store
from scripted import SAMPLING, ScriptedGenerator

from lenvm_lightning.errors import GeneratorError, StoreError
from lenvm_lightning.rollouts.ask import ask_for_missing
from lenvm_lightning.rollouts.generators.interface import Failure
from lenvm_lightning.utils.progress import CompletionProgress


def ask(store, generator, keep=None):
    progress = CompletionProgress(
        "sample", store.total, lambda: generator.tokens_written, SAMPLING.max_tokens, seconds=0.0, ticks=False
    )
    return ask_for_missing(
        generator,
        store.missing(),
        SAMPLING,
        missing=store.total - store.done - len(store.failures),
        keep=keep or store.add_answer,
        progress=progress,
        store=store,
    )


class Closing(ScriptedGenerator):
    """Notes whether what it had under way was abandoned in order."""

    closed = False

    def sample(self, requests, sampling):
        try:
            yield from super().sample(requests, sampling)
        finally:
            self.closed = True


def test_everything_is_asked_for_and_shown(tmp_path, capsys):
    generator = ScriptedGenerator(fails={("p/1", 0): Failure("no", final=True)})
    with open_store(tmp_path) as store:
        assert ask(store, generator) > 0
        assert (store.done, list(store.failures)) == (23, [("p/1", 0)])
        assert ask(store, generator) is None  # nothing was left
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 24
    assert lines[-1].startswith("sample: 24/24 completions, ")
    assert lines[-1].endswith(f"truncated {store.counts.truncated_share:.1%}")


NONSENSE = [
    {"token_ids": [-5]},
    {"token_ids": [2**70]},
    {"token_ids": [1.5]},
    {"token_ids": "12"},
    {"token_ids": None},
    {"text": "half \ud800"},
    {"text": None},
    {"logprob": 1e308},
    {"logprob": -(10**400)},
    {"logprob": "-0.5"},
]


class Nonsensical(ScriptedGenerator):
    """Every second answer is nonsense, of another kind each time."""

    def sample(self, requests, sampling):
        for number, answer in enumerate(super().sample(requests, sampling)):
            wrong = NONSENSE[number // 2 % len(NONSENSE)] if number % 2 else {}
            yield replace(answer, result=replace(answer.result, **wrong))


def test_nonsense_is_a_failure_and_is_asked_for_again(tmp_path):
    with open_store(tmp_path) as store:
        ask(store, Nonsensical())
        assert (store.done, len(store.failures)) == (12, 12)
        assert not any(failure.final for failure in store.failures.values())
        assert all("cannot be kept: " in failure.reason for failure in store.failures.values())
    with open_store(tmp_path) as store:
        assert store.notes == []
        assert (store.done, store.failures) == (12, {})
        ask(store, ScriptedGenerator())
        assert store.done == 24


@pytest.mark.parametrize("logprob", [float("-inf"), float("nan")])
def test_a_logprob_that_is_no_number_is_not_known(tmp_path, logprob):
    class Infinite(ScriptedGenerator):
        def sample(self, requests, sampling):
            for answer in super().sample(requests, sampling):
                yield replace(answer, result=replace(answer.result, logprob=logprob))

    kept = []
    with open_store(tmp_path) as store:
        ask(store, Infinite(), keep=lambda answer: (kept.append(answer.result.logprob), store.add_answer(answer)))
    assert kept == [None] * 24


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "stopped: 5 of 24 completions are in {} and stay; the same command goes on from there."),
        (SystemExit(143), "stopped: 5 of 24 completions are in {} and stay; the same command goes on from there."),
        (StoreError("full"), ""),  # says itself what stays
    ],
)
def test_whatever_stops_it_abandons_what_is_under_way(tmp_path, capsys, error, words):
    generator = Closing()
    with open_store(tmp_path) as store:

        def keep(answer):
            if store.done == 5:
                raise error
            store.add_answer(answer)

        with pytest.raises(type(error)):
            ask(store, generator, keep)
    assert generator.closed
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("sample: ")]
    assert said == [words.format(tmp_path)] * bool(words)


def test_a_generator_that_stops_silently(tmp_path):
    class Short(ScriptedGenerator):
        def sample(self, requests, sampling):
            yield from list(super().sample(requests, sampling))[:-2]

    with open_store(tmp_path) as store:
        with pytest.raises(
            GeneratorError, match=r"scripted silently stopped 2 answers short\.\n22 of 24 completions are in"
        ):
            ask(store, Short())
        assert store.done == 22
