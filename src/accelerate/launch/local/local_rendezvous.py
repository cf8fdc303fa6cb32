"""Rendezvous of the ranks of one machine: a store on 127.0.0.1, which other machines cannot reach.

torch's own rendezvous listens on every interface. Here the port is bound first and handed to the store, so that no other
program can take it in between.
"""

from __future__ import annotations

import datetime
import socket
from typing import TYPE_CHECKING, Any

from ...runtime.cluster.cluster_env import LOOPBACK

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousInfo


class LoopbackRendezvous:
    """A rendezvous handler for one machine; duck-typed, as torch's `RendezvousHandler` imports torch.

    Args:
        port: The preferred port; 0, or one that is taken, selects any free port.

    Attributes:
        port: The port to which ranks connect.
    """

    use_agent_store = True

    def __init__(self, port: int) -> None:
        self._listen(port)
        self._store: Any = None

    def _listen(self, port: int) -> None:
        try:
            self._socket: socket.socket | None = listen_on_loopback(port)
        except OSError:  # taken
            self._socket = listen_on_loopback(0)
        self.port: int = self._socket.getsockname()[1]

    def serve(self) -> Any:
        """Opens a new store; restarted ranks find no keys of those before them."""
        import torch.distributed as dist

        if self._socket is None:
            self._listen(0)
        assert self._socket is not None
        self._store = dist.TCPStore(  # type: ignore[attr-defined, unused-ignore]  # there, if not declared
            LOOPBACK,
            self.port,
            is_master=True,
            timeout=datetime.timedelta(seconds=60),
            wait_for_workers=False,
            master_listen_fd=self._socket.detach(),  # the store closes it
            use_libuv=False,  # before torch 2.7, libuv's store does not accept a socket
        )
        self._socket = None
        return self._store

    def next_rendezvous(self) -> RendezvousInfo:
        """Returns group rank 0 of 1: this agent is the only one."""
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        return RendezvousInfo(self.serve(), 0, 1, RendezvousStoreInfo(LOOPBACK, self.port))

    def get_backend(self) -> str:
        return "loopback"

    def get_run_id(self) -> str:
        return "accelerate"

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Does nothing: there are no other agents."""

    def shutdown(self) -> bool:
        """Closes the store."""
        self._store = None
        return True


def listen_on_loopback(port: int) -> socket.socket:
    """Returns a socket that listens on 127.0.0.1; port 0 selects any free port.

    Raises:
        OSError: if the port is taken.
    """
    return socket.create_server((LOOPBACK, port), backlog=2048)
