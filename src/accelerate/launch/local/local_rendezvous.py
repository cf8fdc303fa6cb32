"""The meeting point of ranks on one machine: a store that listens on 127.0.0.1, out of reach of other machines.

torch's own rendezvous listens on every interface. Here the port is bound first and handed to the store, so that nobody
can take it in between either.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from ...runtime.cluster.cluster_env import LOOPBACK
from ...runtime.cluster.network import listen

if TYPE_CHECKING:
    import socket

    from torch.distributed.elastic.rendezvous import RendezvousInfo

ADDRESS = LOOPBACK


class Loopback:
    """A rendezvous of one machine; one of torch's `RendezvousHandler` by its methods, as the base class imports torch.

    Args:
        port: The port wanted; 0, or one that is taken, means any free one.

    Attributes:
        port: The port that ranks connect to.
    """

    use_agent_store = True

    def __init__(self, port: int) -> None:
        self._listen(port)
        self._store: Any = None

    def _listen(self, port: int) -> None:
        self._socket = _bound(port) or _bound(0)
        assert self._socket is not None
        self.port: int = self._socket.getsockname()[1]

    def serve(self) -> Any:
        """Opens the store (a new one each time: ranks that start again find nothing of those before them)."""
        import torch.distributed as dist

        if self._socket is None:
            self._listen(0)
        assert self._socket is not None
        self._store = dist.TCPStore(  # type: ignore[attr-defined, unused-ignore]  # there, if not declared
            ADDRESS,
            self.port,
            is_master=True,
            timeout=datetime.timedelta(seconds=60),
            wait_for_workers=False,
            master_listen_fd=self._socket.detach(),  # the store closes it
            use_libuv=False,  # before torch 2.7, libuv's store takes no socket
        )
        self._socket = None
        return self._store

    def next_rendezvous(self) -> RendezvousInfo:
        """The place of this machine's agent: the only one."""
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        return RendezvousInfo(self.serve(), 0, 1, RendezvousStoreInfo(ADDRESS, self.port))

    def get_backend(self) -> str:
        return "loopback"

    def get_run_id(self) -> str:
        return "accelerate"

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else waits for it."""

    def shutdown(self) -> bool:
        """Closes the store."""
        self._store = None
        return True


def _bound(port: int) -> socket.socket | None:
    try:
        return listen(ADDRESS, port)
    except OSError:  # taken
        return None
