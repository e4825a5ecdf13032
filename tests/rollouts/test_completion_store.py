"""The store that rollouts and evaluations share: what it knows of records, and what it says when it stops."""

import json
from dataclasses import asdict, dataclass

import pytest
from full_disk import room_for

from lenvm_lightning.errors import GeneratorError, StoreError
from lenvm_lightning.rollouts.completion_store import CompletionStore
from lenvm_lightning.rollouts.generators.interface import Failure
from lenvm_lightning.rollouts.store import PlacesInOrder

SETTINGS = {"n": 3}


@dataclass(frozen=True)
class Word:
    """The smallest record there can be."""

    number: int
    text: str

    @property
    def key(self):
        return self.number

    @property
    def called(self):
        return f"word {self.number}"

    def as_line(self):
        return asdict(self)

    @classmethod
    def from_line(cls, line):
        return cls(**line)


class Words(CompletionStore[int, Word]):
    """Remembers the texts; wants numbers below ten."""

    def __init__(self, folder, settings=SETTINGS, **options):
        super().__init__(folder, settings, Word, file="words.jsonl", **options)
        self.texts = {}

    def forget(self):
        self.texts.clear()

    def remember(self, record):
        self.texts[record.key] = record.text

    def wanted(self, key):
        return key < 10


def test_records_are_remembered_when_added_and_when_read(tmp_path):
    with Words(tmp_path / "made") as store:
        assert (store.done, store.has(1)) == (0, False)
        store.add(Word(1, "é\n"))
        store.add(Word(0, "b"))
        assert store.texts == {1: "é\n", 0: "b"}
    with Words(tmp_path / "made") as again:
        assert again.texts == store.texts
        assert (again.done, again.has(1), again.has(2), again.notes) == (2, True, False, [])
    assert json.loads((tmp_path / "made" / "settings.json").read_text()) == SETTINGS


def test_what_nobody_wants_twice_or_at_all(tmp_path):
    with Words(tmp_path) as store:
        store.add(Word(1, "a"))
        store.add_failure(2, "word 2", Failure("too long", final=True))
        for record, words in (
            (Word(1, "b"), "word 1 came a second time"),
            (Word(2, "b"), "word 2 came a second time"),
            (Word(12, "b"), "word 12 was not asked for"),
        ):
            with pytest.raises(GeneratorError, match=words):
                store.add(record)
            with pytest.raises(GeneratorError, match=words):
                store.add_failure(record.key, record.called, Failure("no", final=False))
        assert store.texts == {1: "a"}
        assert store.failures == {2: Failure("too long", final=True)}
    assert (tmp_path / "words.jsonl").read_text() == '{"number": 1, "text": "a"}\n'


def test_lines_that_cannot_be_are_set_aside_one_by_one(tmp_path):
    with Words(tmp_path) as store:
        for number in range(3):
            store.add(Word(number, "a"))
    file = tmp_path / "words.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    bad = [b"{}\n", b"[1]\n", b"null\n", b'{"number": 77, "text": "b"}\n', lines[0]]
    file.write_bytes(b"".join([*lines[:2], *bad, lines[2]]))
    with Words(tmp_path) as store:
        assert store.texts == {0: "a", 1: "a", 2: "a"}
    assert [note.partition(": ")[2].partition(" (")[0].partition(";")[0] for note in store.notes] == [
        "not a whole record", "not a whole record", "not a whole record", "word 77 was not asked for",
        "word 0 for the second time",
    ]  # fmt: skip
    assert file.read_bytes() == b"".join(lines)
    assert (tmp_path / "broken.jsonl").read_bytes() == b"".join(bad)


@pytest.mark.parametrize(("total", "count"), [(None, "1 completions"), (1234, "1 of 1,234 completions")])
def test_what_stays_is_said_the_same_way_everywhere(tmp_path, total, count):
    with Words(tmp_path, total=total) as store:
        store.add(Word(1, "a"))
        assert store.what_stays() == f"{count} are in {tmp_path} and stay; the same command goes on from there."
        with (
            room_for(40),
            pytest.raises(
                StoreError, match=f"{tmp_path} cannot be written: File too large. {count} are there and stay"
            ),
        ):
            store.add(Word(2, "b" * 100))
        assert not store.has(2)
        assert not (tmp_path / "words.jsonl").read_bytes().count(b"b" * 10)


def test_other_settings_are_refused_only_where_there_is_something(tmp_path):
    with Words(tmp_path, {"n": 4}):
        pass
    with Words(tmp_path) as store:
        store.add(Word(1, "a"))
    with pytest.raises(StoreError, match=r"(?s)sampled with other settings:\n  n: 3 -> 4\nChoose another folder"):
        Words(tmp_path, {"n": 4}).__enter__()
    assert not (tmp_path / ".lock").exists()


def test_places_in_order_know_what_is_wanted_and_there():
    places = PlacesInOrder(["b", "a"], 2)
    for key in (("c", 0), ("a", 2), ("a", -1), ("a", "0"), ("a", True)):
        assert not places.wanted(key)
    for place, key in enumerate([("a", 1), ("b", 1), ("a", 0)]):
        assert places.wanted(key)
        assert key not in places
        places[key] = 10 * place
        assert key in places
    places["a", 0] = 70
    assert len(places) == 3
    assert list(places.in_order()) == [10, 70, 0]
    places.clear()
    assert (len(places), list(places.in_order())) == (0, [])


def everything(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("settings", [None, "{}", "[1]", "{", '{"editor.tabSize": 4}', '{"n": 3, "m": 4}'])
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path, settings):
    for name in ("words.txt", "tensorboard/log", "report.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    before = everything(tmp_path)
    with pytest.raises(
        StoreError, match=r"is not empty, and .*Nothing in it is touched\. Choose another folder \(--out\)"
    ):
        Words(tmp_path).__enter__()
    assert everything(tmp_path) == before


def test_a_folder_of_other_settings_is_taken_where_it_holds_nothing(tmp_path):
    with Words(tmp_path, {"n": 4}):
        pass
    (tmp_path / ".settings.json").write_text("{")  # of a process that was killed
    with Words(tmp_path) as store:
        store.add(Word(1, "a"))
    with pytest.raises(StoreError, match="n: 3 -> 4"), Words(tmp_path, {"n": 4}):
        pass
