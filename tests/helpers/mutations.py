"""Hostile versions of good input: bytes changed at random, and JSON values replaced by what nobody expects."""

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

NASTY_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x" * 10_000, "\ud800", "\x00", "\x1b[31m", "../../etc/passwd", "/dev/zero", "nan", "1e999", "<image>",
    [], {}, [[]], [None], {"": None}, [1, "2", None], {"a": {"b": {"c": []}}},
]  # fmt: skip
NASTY_TEXTS = [
    b"", b"\x00", b"\xff\xfe\x00", b"{", b"}", b"[" * 3_000, b'"' * 7, b"null", b"NaN", b"1" * 5_000, b"\r\n",
    b"\n" * 50, b"[" * 100_000, b'{"a":' * 20_000, "漢\u202e".encode(), b"\xed\xa0\x80", b"&a [*a, *a]",
    b"!!python/object:os.system",
]  # fmt: skip


def mutated(seed: bytes, random: Random) -> bytes:
    """One to four random changes: bytes flipped, cut out, repeated, put in, or the end torn off."""
    data = bytearray(seed)
    for _ in range(random.randrange(1, 5)):
        place = random.randrange(len(data) + 1)
        length = random.choice((1, 1, 2, 8, 64))
        change = random.randrange(6)
        if change == 0 and data:
            data[place % len(data)] ^= 1 << random.randrange(8)
        elif change == 1:
            del data[place : place + length]
        elif change == 2:
            data[place:place] = data[place : place + length] * random.choice((1, 2, 50))
        elif change == 3:
            data[place:place] = random.choice(NASTY_TEXTS)
        elif change == 4:
            data[place : place + length] = random.randbytes(length)
        else:
            del data[place:]
    return bytes(data)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a JSON value, itself included."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _places(part, (*path, key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _places(part, (*path, number))


def changed_json(value: Any, random: Random) -> Any:
    """A JSON value with one to three values replaced, taken out, doubled, or called otherwise."""
    value = copy.deepcopy(value)
    for _ in range(random.randrange(1, 4)):
        path = random.choice(list(_places(value)))
        if not path:
            if random.random() < 0.05:
                return random.choice(NASTY_VALUES)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, change = path[-1], random.randrange(5)
        if change < 3:
            holder[key] = copy.deepcopy(random.choice(NASTY_VALUES))
        elif isinstance(holder, list):
            if change == 3:
                del holder[key]
            else:
                holder += [copy.deepcopy(holder[key])] * random.choice((1, 300))
        elif change == 3:
            del holder[key]
        else:
            holder[random.choice(("", "x", str(key).upper(), "__class__"))] = holder.pop(key)
    return value


def hostile(seed: bytes, random: Random) -> bytes:
    """A hostile version of good input, which is a line of JSON, lines of JSON, or anything else."""
    if random.random() < 0.5:
        return mutated(seed, random)
    lines = seed.split(b"\n")
    place = random.randrange(len(lines))
    try:
        value = json.loads(lines[place])
    except ValueError:
        try:
            return _written(changed_json(json.loads(seed), random))
        except ValueError:
            return mutated(seed, random)
    lines[place] = _written(changed_json(value, random))
    return b"\n".join(lines)


def _written(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="surrogatepass")
