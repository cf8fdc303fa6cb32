"""What the launchers of several machines tell each other while ranks run: that they live, and how they ended.

A thread with a connection of its own does all that touches the store, since a machine that loses its power leaves others
waiting for an answer. The machine with group rank 0 watches all; the others watch it, and read what is told.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import Store

_BEAT_SECONDS = 1.0
_QUICK_SECONDS = 0.1
# For how long a machine may be silent when ranks here have lost a peer already, and how long to look for the reason.
_SUSPECT_SECONDS = 5.0
_EXPLAIN_SECONDS = 12.0
_LEAVE_SECONDS = 15.0


class End(NamedTuple):
    """How the ranks on one machine ended.

    Attributes:
        machine: The machine, in words.
        line: What to say on the others.
        code: The exit code; 0 when all went well.
        innocent: Whether the reason lies on another machine.
    """

    machine: str
    line: str = ""
    code: int = 0
    innocent: bool = False


class Elsewhere(Exception):
    """The ranks here must end because of what has happened on another machine.

    Attributes:
        end: What happened.
    """

    def __init__(self, end: End) -> None:
        super().__init__(end.line)
        self.end = end


class Neighbours(threading.Thread):
    """The other machines, during one round.

    Args:
        connect: Opens a connection to the store, with keys of this round.
        rank: This machine's place in the round.
        count: How many machines are in it.
        machine: This machine, in words.
        holder: The machine that holds the store, in words.
        silence: After how many seconds without a sign of life a machine counts as gone.

    Attributes:
        again: Whether a machine has called all to start their ranks again.
    """

    def __init__(
        self, connect: Callable[[], Store], rank: int, count: int, machine: str, holder: str, silence: float
    ) -> None:
        super().__init__(name="accelerate-neighbours", daemon=True)
        self.again = False
        self.machine = machine
        self._holder = holder
        self._connect, self._rank, self._count, self._silence = connect, rank, count, silence
        self._post: deque[Callable[[Store], Any]] = deque()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._pause = _BEAT_SECONDS
        self._beats = 0
        self._last = time.monotonic()
        self._cut = False
        self._ended = self._left = 0  # how many machines
        self._ends: dict[int, End] = {}  # those that ended badly
        self._signs: dict[int, tuple[str, float]] = {}  # machine -> its last sign of life, and when it came
        self._names: dict[int, str] = {}
        self.start()

    # What the launcher says and asks: none of it waits for the network -------------------------------------------------

    def look(self) -> None:
        """Raises:
        Elsewhere: when a machine has ended badly, or gives no sign of life.
        """
        end = self._trouble(self._silence)
        if end is not None:
            raise Elsewhere(end)

    def explain(self) -> End | None:
        """Why ranks here have lost a peer: what happened on another machine, if that comes out within some seconds."""
        self._hurry()
        deadline = time.monotonic() + _EXPLAIN_SECONDS
        while time.monotonic() < deadline and self._ended < self._count - 1:
            end = self._trouble(min(self._silence, _SUSPECT_SECONDS))
            if end is not None and not end.innocent:
                return end
            time.sleep(_QUICK_SECONDS)
        end = self._trouble(self._silence)
        return None if end is None or end.innocent else end

    def call_again(self) -> None:
        """Calls all machines to start their ranks again."""
        self._send(lambda store: store.set("again", "1"))

    def finish(self) -> None:
        """Says that the ranks here have ended well, and waits until all have.

        Raises:
            Elsewhere: when those of another machine have not.
        """
        self.tell(End(self.machine))
        while self._ended < self._count:
            self.look()
            time.sleep(_QUICK_SECONDS)
        self.look()

    def tell(self, end: End) -> None:
        """Tells the others how the ranks here ended."""

        def send(store: Store) -> None:
            store.set(f"end/{self._rank}", json.dumps(end))
            if end.code:
                store.add("bad", 1)
            store.add("ended", 1)

        self._send(send)

    def leave(self, last: bool) -> None:
        """Stops.

        Args:
            last: Whether the others need this machine's store, and go first: those of them that still live.
        """
        self._send(lambda store: store.add("left", 1))
        deadline = time.monotonic() + (_LEAVE_SECONDS if last else 2.0)
        while self.is_alive() and time.monotonic() < deadline:
            if not self._post and (not last or self._left + len(self._silent(_SUSPECT_SECONDS)) >= self._count):
                break
            time.sleep(_QUICK_SECONDS)
        self.stop()

    def stop(self) -> None:
        """Stops without a word."""
        self._stopped.set()
        self._wake.set()
        self.join(timeout=2.0)

    def _send(self, message: Callable[[Store], Any]) -> None:
        self._post.append(message)
        self._hurry()

    def _hurry(self) -> None:
        self._pause = _QUICK_SECONDS
        self._wake.set()

    def _trouble(self, limit: float) -> End | None:
        bad = [end for rank, end in sorted(self._ends.items()) if rank != self._rank]
        if bad:
            return min(bad, key=lambda end: end.innocent)
        silent = self._silent(limit)
        if silent:
            return _gone(self._names[min(silent)], f"no sign of life for {limit:g} s")
        if self._cut or time.monotonic() - self._last > limit:
            return _gone(self._holder, "the connection to it is lost")
        return None

    def _silent(self, limit: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since) in self._signs.copy().items() if now - since > limit]

    # The thread --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        from torch.distributed import DistError

        try:
            store = self._connect()
            while not self._stopped.is_set():
                self._exchange(store)
                self._last = time.monotonic()
                self._wake.wait(self._pause)
                self._wake.clear()
        except DistError:  # whoever holds the store has gone
            self._cut = True

    def _exchange(self, store: Store) -> None:
        self._beats += 1
        store.set(f"sign/{self._rank}", f"{self._beats} {self.machine}")
        while self._post:
            self._post[0](store)
            self._post.popleft()
        self.again = self.again or store.check(["again"])
        ended, self._left = store.add("ended", 0), store.add("left", 0)
        if store.check(["bad"]):
            for rank in range(self._count):
                if rank not in self._ends and store.check([f"end/{rank}"]):
                    end = End(*json.loads(store.get(f"end/{rank}")))
                    self._ends = {**self._ends, **({rank: end} if end.code else {})}  # others read it meanwhile
        self._ended = ended  # only now: how they ended is known
        for rank in range(1, self._count if self._rank == 0 else 1):
            self._watch(store, rank)

    def _watch(self, store: Store, rank: int) -> None:
        if not store.check([f"sign/{rank}"]):
            return
        sign = store.get(f"sign/{rank}").decode()
        self._names[rank] = sign.partition(" ")[2]
        if self._signs.get(rank, ("", 0.0))[0] != sign:
            self._signs[rank] = (sign, time.monotonic())
        elif self._ended and store.check([f"end/{rank}"]):  # it has said why it is silent
            self._signs.pop(rank)


def _gone(machine: str, how: str) -> End:
    return End(machine, f"{machine} is gone: {how}. Its launcher was killed, it stopped, or the network failed", 1)
