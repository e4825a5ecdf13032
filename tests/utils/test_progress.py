"""Progress with a clock of its own: what is said and when, tokens/s and time left from the first seconds on."""

import random
import re
import sys
import threading

import pytest

from lenvm_lightning.utils.progress import CompletionProgress, Progress, clock_text, expected_length, time_left


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal:
    """A stderr that is one."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True

    def fileno(self):
        raise OSError


@pytest.fixture
def clock():
    return Clock()


def writing(clock, written, total=100, limit=1000, **options):
    return CompletionProgress("sample", total, lambda: written[0], limit, clock=clock, ticks=False, **options)


def test_a_line_every_now_and_then_says_what_is_done_of_what(clock, capsys):
    with Progress("train", "steps", 600, 100, seconds=20, clock=clock) as progress:
        clock.now += 19.9
        assert not progress.is_due
        progress.show(110, tokens_per_s=5.0)
        assert capsys.readouterr().err == ""
        clock.now += 3700.1
        assert progress.is_due
        progress.show(1200, tokens_per_s=12345.6, seconds_left=65.9, facts={"loss": "0.25"})
        line = "train: 1,200/600 steps, 12,346 tokens/s, 1:02:00 elapsed, 1:05 left, loss 0.25\n"
        assert capsys.readouterr().err == line
        progress.show(1201)
        assert capsys.readouterr().err == ""  # that was a moment ago
        progress.show(1201, at_once=True)
        assert capsys.readouterr().err == "train: 1,201/600 steps, 1:02:00 elapsed\n"  # nothing that nobody knows


def test_a_total_that_nobody_knows(clock, capsys):
    with Progress("train", "steps", None, clock=clock) as progress:
        progress.show(3, at_once=True)
    assert capsys.readouterr().err == "train: 3 steps, 0:00 elapsed\n"


@pytest.mark.parametrize("total", [8, None])
def test_a_bar_on_a_terminal_says_the_same(clock, monkeypatch, total):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("train", "steps", total, 2, clock=clock) as progress:
        clock.now += 60
        progress.show(4, tokens_per_s=1000.0, seconds_left=30.0, facts={"loss": "0.5"})
    last = terminal.text.rpartition("\r")[2]
    assert re.search(r"train: .*4/(8|\?) steps, 1,000 tokens/s, 1:00 elapsed, 0:30 left, loss 0\.5", last), last


def test_tokens_of_completions_under_way_count_from_the_first_second(clock, capsys):
    written = [5000]  # by an earlier call of the same generator
    with writing(clock, written) as progress:
        assert (progress.tokens_per_s, progress.seconds_left) == (None, None)
        clock.now += 2.0
        written[0] += 400
        assert progress.tokens_per_s == 200.0
        assert progress.seconds_left is None  # nobody knows how long they will be
        progress.show(at_once=True)
        assert f"left at most {clock_text(progress.most_seconds_left)}" in capsys.readouterr().err
        progress.finished(50, truncated=False)
        # 350 are under way: of 50 tokens in the mean says the finished one, of 400 say all that were written.
        assert progress.tokens_per_s == 200.0
        assert progress.seconds_left == pytest.approx(99 * (50 * 400) ** 0.5 / 200)
        progress.show(at_once=True)
    assert "sample: 1/100 completions, 200 tokens/s, 0:02 elapsed, 1:10 left, truncated 0.0%" in capsys.readouterr().err


def test_time_left_is_right_where_all_are_equally_long(clock):
    """Ten at a time of 100 tokens each, a token a second: 100 completions take 1,000 seconds."""
    written = [0]
    with writing(clock, written) as progress:
        for step in range(1, 1001):
            clock.now += 1.0
            written[0] += 10
            if step % 100 == 0:
                for _ in range(10):
                    progress.finished(100, truncated=False)
            if step >= 100:
                # Between two ends what is under way may belong to longer ones: guessed too high, by 100 tokens at most
                # where many are done, and by more than half nowhere.
                assert 1000 - step - 1e-6 <= progress.seconds_left < (1000 - step) * 1.5 + 110
            if step % 100 == 0:
                assert progress.seconds_left == pytest.approx(1000 - step)
            assert progress.tokens_per_s == pytest.approx(10.0)


def test_a_generator_that_counts_finished_completions_only(clock):
    with writing(clock, [0]) as progress:
        for _ in range(4):
            clock.now += 5.0
            progress.finished(40, truncated=True)
        assert progress.tokens_per_s == 8.0
        assert progress.seconds_left == pytest.approx(96 * 5.0)


def test_completions_of_earlier_runs_say_how_long_others_will_be(clock, capsys):
    written = [0]
    with writing(clock, written, there=50, tokens_there=5000, truncated=10, failed=2) as progress:
        clock.now += 4.0
        written[0] += 400
        assert progress.tokens_per_s == 100.0
        length = (100 * 5400 / 50) ** 0.5
        assert progress.seconds_left == pytest.approx(48 * length / 100)
        progress.failed()
        assert progress.seconds_left == pytest.approx(47 * length / 100)
        progress.show(at_once=True)
    assert (
        "sample: 53/100 completions, 100 tokens/s, 0:04 elapsed, 0:48 left, truncated 20.0%" in capsys.readouterr().err
    )


def test_time_left_is_close_long_before_the_first_ones_are_typical(clock):
    """64 at a time of widely spread lengths: from a tenth of the way on, never off by more than a third."""
    lengths = [random.Random(k).lognormvariate(4.8, 0.6) for k in range(1500)]
    written, waiting = [0], [max(1, round(length)) for length in lengths]
    under_way, guesses = [], []
    with writing(clock, written, total=len(waiting)) as progress:
        while waiting or under_way:
            while waiting and len(under_way) < 64:
                length = waiting.pop()
                under_way.append([length, length])
            clock.now += 0.5
            written[0] += len(under_way)
            for one in under_way:
                one[1] -= 1
                if not one[1]:
                    progress.finished(one[0], truncated=False)
            under_way = [one for one in under_way if one[1]]
            guesses.append((clock.now, progress.seconds_left))
    for now, guess in guesses[len(guesses) // 10 : len(guesses) * 7 // 10]:
        assert guess == pytest.approx(clock.now - now, rel=0.34)


def test_a_thread_shows_it_while_nothing_ends(capsys):
    """Completions may take minutes, and only a finished one gives the word back to whoever asked."""
    written = [0]
    with CompletionProgress("sample", 9, lambda: written[0], 100, seconds=0.0) as progress:
        written[0] = 70
        threading.Event().wait(1.3)
        assert progress.tokens == 70
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(
        re.fullmatch(r"sample: 0/9 completions, \d+ tokens/s, 0:0\d elapsed, left at most 0:\d\d, truncated 0.0%", one)
        for one in lines
    )
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_stderr_that_is_gone_ends_the_thread_only(monkeypatch, capsys):
    class Gone:
        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

    with CompletionProgress("sample", 9, lambda: 0, 100, seconds=0.0), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        threading.Event().wait(0.7)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("finished", "tokens", "under_way", "limit", "length"),
    [
        (0, 0, 500, 100, None),
        (10, 400, 0, 100, 40.0),
        (10, 400, 500, 100, 60.0),
        (1, 90, 5000, 100, 100.0),  # none can be longer
    ],
)
def test_expected_length(finished, tokens, under_way, limit, length):
    assert expected_length(finished, tokens, under_way, limit) == (None if length is None else pytest.approx(length))


def test_time_left_of_equal_parts():
    assert time_left(60.0, 3, 10) == pytest.approx(200.0)
    assert time_left(60.0, 0, 10) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (65, "1:05"), (3599, "59:59"), (7439, "2:03:59")]
)
def test_times_for_people(seconds, text):
    assert clock_text(seconds) == text
