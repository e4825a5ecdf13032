"""Hostile input of every kind: an error of this package's own family, or success; never a raw traceback or a hang.

Briefly by default. Long, with figures in a file:

    LENVM_FUZZ_INPUTS=10000 LENVM_FUZZ_REPORT=fuzz.jsonl pytest tests/fuzz -m slow -n 2

A slow target gets a share of the inputs. `LENVM_FUZZ_SEED` gives others.
"""

import json
import math
import os
import resource
import signal
import time
from pathlib import Path
from random import Random

import pytest
from fuzz_files import FILES
from fuzz_server import SERVER, close_server
from fuzz_targets import TARGETS as OTHERS
from mutations import hostile

from lenvm_lightning.errors import LenVMError

TARGETS = {**OTHERS, **FILES, **SERVER}
SEED = int(os.environ.get("LENVM_FUZZ_SEED", "2"))
LONG = int(os.environ.get("LENVM_FUZZ_INPUTS", "1000"))
SECONDS = 20  # for one input, on a machine that is busy with something else
MEMORY = 2 * 2**30  # bytes that this process may grow by, over all inputs of a target


def attack(target, folder: Path, inputs: int, seed: int) -> dict[str, float]:
    """Give a target so many hostile inputs; how many it took and refused, and the longest of them in seconds."""
    random = Random(seed)
    run, seeds = target.prepare(folder)
    taken, longest = 0, 0.0
    for number in range(inputs):
        name, good = random.choice(sorted(seeds.items()))
        data = hostile(good, random)
        began = time.monotonic()
        signal.alarm(SECONDS)
        try:
            run(name, data)
            taken += 1
        except LenVMError:
            pass
        except BaseException:
            (folder / "found").write_bytes(data)
            print(f"input {number} of seed {seed}, {name}: {data[:2000]!r}")
            raise
        finally:
            signal.alarm(0)
        longest = max(longest, time.monotonic() - began)
    return {"inputs": inputs, "taken": taken, "longest_s": round(longest, 3)}


def grown() -> int:
    """Largest memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(autouse=True, scope="module")
def server_ends():
    yield
    close_server()


@pytest.fixture(autouse=True)
def alarm():
    """An alarm is a hang."""

    def hang(number, frame):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", TARGETS)
def test_briefly(name, tmp_path):
    before = grown()
    attack(TARGETS[name], tmp_path, 10 if TARGETS[name].share < 0.1 else 40, seed=1)
    assert grown() - before < MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_long(name, tmp_path):
    before = grown()
    found = attack(TARGETS[name], tmp_path, math.ceil(LONG * TARGETS[name].share), seed=SEED)
    found |= {"target": name, "memory_mib": (grown() - before) // 2**20}
    if "LENVM_FUZZ_REPORT" in os.environ:
        with Path(os.environ["LENVM_FUZZ_REPORT"]).open("a", encoding="utf-8") as report:
            report.write(json.dumps(found) + "\n")
    assert grown() - before < MEMORY


def test_the_fuzzer_finds_a_raw_error(tmp_path):
    """It would be no test if everything passed it."""

    class Careless:
        def prepare(self, folder):
            return (lambda name, data: json.loads(data)["a"]), {"one": b'{"a": 1}'}

    with pytest.raises((ValueError, KeyError, TypeError, RecursionError)):
        attack(Careless(), tmp_path, 200, seed=1)
