"""The rendezvous of machines that have met, in torch's words: each start of the ranks is a round with keys of its own.

A machine whose rank has failed calls all to the next round; on none are ranks started before all have come.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .static_rendezvous import KEY, POLL_SECONDS, Meeting, NoMeeting

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousInfo

    from .heartbeat import Neighbours


class Rounds:
    """One of torch's `RendezvousHandler` by its methods, as the base class imports torch.

    Args:
        meeting: Where the machines have met.

    Attributes:
        neighbours: Set by the agent, round by round.
    """

    use_agent_store = True

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.neighbours: Neighbours | None = None
        self._round = -1

    def next_rendezvous(self) -> RendezvousInfo:
        """This machine's place in the next round; waits until all have come to it."""
        import torch.distributed as dist
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        terms, store = self.meeting.terms, self.meeting.store
        assert store is not None and terms.rank is not None
        self._round += 1
        if self._round > 0:
            self._gather_again()
        return RendezvousInfo(
            dist.PrefixStore(f"{KEY}/round/{self._round}", store),
            terms.rank,
            terms.machines,
            RendezvousStoreInfo(terms.address, terms.port),
        )

    def _gather_again(self) -> None:
        terms, store, neighbours = self.meeting.terms, self.meeting.store, self.neighbours
        assert store is not None and neighbours is not None
        neighbours.call_again()
        deadline = time.monotonic() + terms.timeout
        key = f"{KEY}/again/{self._round}"
        store.add(key, 1)
        while store.add(key, 0) < terms.machines:
            neighbours.look()
            if time.monotonic() > deadline:
                raise NoMeeting(
                    f"{self.meeting.me} waited {terms.timeout:g} s at {self.meeting.where} for all {terms.machines} "
                    f"machines to start their ranks again, and {store.add(key, 0)} did"
                )
            time.sleep(POLL_SECONDS)

    def num_nodes_waiting(self) -> int:
        return int(self.neighbours is not None and self.neighbours.again)

    def get_backend(self) -> str:
        return "static"

    def get_run_id(self) -> str:
        return "accelerate"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Others learn of an end from their neighbours."""

    def shutdown(self) -> bool:
        return True
