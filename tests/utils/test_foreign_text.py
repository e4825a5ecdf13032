import pytest

from lenvm_lightning.utils.foreign_text import as_shown, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("out of memory", "out of memory"),
        ("  two\n\n lines\t", "two lines"),
        ("Größe: 5 µm 猫", "Größe: 5 µm 猫"),
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
        ("a\rb\x00c\x7f\x9b", r"a b\x00c\x7f\x9b"),
        ("to the left \u202etfel", r"to the left \u202etfel"),
        ("half \ud800", r"half \ud800"),
        ({"detail": ["x", 5]}, "{'detail': ['x', 5]}"),
        (None, "None"),
    ],
)
def test_nothing_but_printable_characters_is_left(text, shown):
    assert as_shown(text) == shown
    assert as_shown(text).isprintable()


def test_long_texts_are_cut():
    assert as_shown("a" * 10, 10) == "a" * 10
    assert as_shown("a" * 11, 10) == "a" * 10 + "…"
    assert as_shown("\x1b" * 10, 10) == r"\x1b\x1b\x" + "…"
    assert len(as_shown(" a" * 5_000_000, 100)) == 101


def test_deep_things_are_told_in_short():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(as_shown(deep)) < 100
    while deep:  # or freeing it would be the test
        deep = deep[0]


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("http://me:hunter2@host:8000/v1", "http://host:8000/v1"),
        ("HTTPS://token@host", "HTTPS://host"),
        ("http://me:a@b#c?d@host/x", "http://host/x"),
        ("http://host/v1/@me", "http://host/v1/@me"),
        ("http://host", "http://host"),
        ("me@host", "me@host"),
        ("tiny-text", "tiny-text"),
        ("http://host/v1?api_key=abc&api-version=3", "http://host/v1?api_key=***&api-version=3"),
        (
            "lenvm-eval --generator 'http://me:p%20w@host' --options '{processor: http://you:x@other}'",
            "lenvm-eval --generator 'http://host' --options '{processor: http://other}'",
        ),
    ],
)
def test_users_passwords_and_keys_are_left_out(text, without):
    assert without_credentials(text) == without
