"""A limit on the time of code that strangers wrote."""

import signal
import threading
import time

import pytest

from lenvm_lightning.utils.time_limit import time_limit


def busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_what_takes_too_long_is_ended():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"more than 0\.05 seconds"), time_limit(0.05):
        busy(20)
    assert time.monotonic() - began < 10
    with time_limit(5):
        busy(0.01)
    with pytest.raises(KeyError), time_limit(5):
        raise KeyError
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_alarms_of_others_still_come():
    came = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: came.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with time_limit(5):
            busy(0.01)
        assert came == []
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.1
        busy(0.2)
        assert came == [signal.SIGALRM]
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with time_limit(5):
            busy(0.05)  # theirs was due meanwhile
        busy(0.05)
        assert len(came) == 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_have_no_limit():
    done = []

    def work():
        with time_limit(0.01):
            busy(0.05)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
