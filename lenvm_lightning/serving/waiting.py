"""Which of the requests that wait is started next: the smallest priority, the one due first, the one that came first.

**Due.** A request is due ``patience`` times its expected tokens after it came, on a clock that counts steps of the
engine: a step is a token of every row. So short ones are due soon, and whoever waits comes nearer to its turn.

**Nobody waits for ever.** A request that comes when another of the same priority is due never overtakes it. A request
whose expected tokens, counted as `USUAL_TOKENS` where they are fewer, have passed ``patience`` times is late: it goes
before all that are not, whatever their priority, and one that comes when it is late never overtakes it.
"""

from collections.abc import Iterator
from typing import Generic, Literal, Protocol, TypeVar

Order = Literal["arrival", "shortest"]
USUAL_TOKENS = 512.0  # of a request, where nobody predicts: the same for all
PATIENCE = 8.0  # docs/experiments.md, "Scheduling": what it costs the mean, and what it spares the longest


class Waits(Protocol):
    """What waits.

    Attributes:
        priority: smaller ones start first.
        expected: tokens that it will take, as far as anybody knows; the same for all leaves them as they came.
        arrived: steps of the engine when it came.
        number: how many came before it.
    """

    priority: int
    expected: float
    arrived: int
    number: int


Item = TypeVar("Item", bound=Waits)


def rank(item: Waits, now: int, patience: float = PATIENCE) -> tuple[bool, int, float, int]:
    """Where a request stands among those that wait; the smallest is next.

    Args:
        item: that waits.
        now: steps of the engine so far.
        patience: steps for each of its tokens after which it is due.

    Returns:
        Whether it is in time (False = late), its priority (0 of those that are late), when it is due, its number.
    """
    due = item.arrived + patience * item.expected
    late = item.arrived + patience * max(item.expected, USUAL_TOKENS)
    in_time = now < late
    return in_time, item.priority if in_time else 0, due, item.number


class WaitingQueue(Generic[Item]):
    """The requests that wait, see the module. Whoever uses it holds a lock.

    Args:
        patience: see `rank`.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._items: dict[int, Item] = {}  # by id, in the order they came
        self._came = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        """In the order they came."""
        return iter(self._items.values())

    def add(self, item: Item, now: int) -> None:
        """Let a request wait from now on."""
        item.arrived, item.number = now, self._came
        self._came += 1
        self._items[id(item)] = item

    def remove(self, item: Item) -> bool:
        """Take a request out; False where it does not wait."""
        return self._items.pop(id(item), None) is not None

    def pop(self, now: int) -> Item:
        """Take the next one out.

        Raises:
            ValueError: nobody waits.
        """
        item = min(self._items.values(), key=lambda one: rank(one, now, self._patience))
        del self._items[id(item)]
        return item
