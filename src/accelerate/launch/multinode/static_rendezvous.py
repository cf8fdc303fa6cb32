"""Static rendezvous of several machines: a TCPStore on machine 0, where each machine registers under its rank.

`join` returns when all machines have registered. Errors name the missing machine, the rank given twice, or the option
that differs, and how machine 0 was contacted. The store listens on the main address only, if that belongs to machine 0.
`StaticRendezvousHandler` adapts the result to torch's elastic agent: each start of the ranks is a round with own keys.
"""

from __future__ import annotations

import datetime
import errno
import json
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ... import __version__
from ...runtime.cluster import network
from ...runtime.cluster.cluster_env import LOOPBACK
from ...settings.option import SettingsError
from ..console import log_line

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo

    from .heartbeat import PeerMonitor

# After this long, a line states what is being waited for.
_LOG_AFTER_SECONDS = 10.0
_PROBE_SECONDS = 5.0
_POLL_SECONDS = 0.2
_STORE_SECONDS = 60.0
# How long the store stays open after a failure, for machines that have not read the reason yet.
_LINGER_SECONDS = 5.0
_KEY = "accelerate"
_COMPLETE = "complete"  # the outcome of a rendezvous; any other value is the reason why it failed
# Options that must be equal on all machines: field of RendezvousConfig -> flag.
_SHARED_OPTIONS = {"machines": "--num_machines", "processes": "--num_processes", "backend": "--rdzv_backend"}


def parse_rdzv_conf(text: str) -> dict[str, str]:
    """Parses --rdzv_conf, ``key=value,key=value``.

    Raises:
        SettingsError: if a pair lacks its key or its value.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for key, equals, value in pairs:
        if not (key.strip() and equals and value.strip()):
            raise SettingsError(f"--rdzv_conf: expected key=value,key=value, found {text!r}.")
    return {key.strip(): value.strip() for key, _, value in pairs}


def float_option(found: Mapping[str, Any], *names: str, default: float) -> float:
    """Returns the first of these keys of --rdzv_conf that is set, as a number.

    Raises:
        SettingsError: if it is not a number.
    """
    for name in names:
        if name in found:
            try:
                return float(found[name])
            except (TypeError, ValueError):
                raise SettingsError(f"--rdzv_conf {name}: expected a number, found {found[name]!r}.") from None
    return default


class RendezvousError(RuntimeError):
    """The machines did not find each other; the message names who waited for whom, and what was tried."""


class RendezvousConfig(NamedTuple):
    """Options of this machine for the rendezvous.

    Attributes:
        rank: Its rank among the machines; None if not given.
        machines: Number of machines.
        processes: Number of processes over all machines.
        address: The main address, a host name or an IP address.
        port: The port there.
        backend: ``static``, or ``c10d``, whose machines need no rank and may be replaced.
        timeout: Seconds to wait for the other machines.
        hosts_store: Whether this machine hosts the store; None: if it is machine 0.
        quiet: Whether to print nothing while waiting.
    """

    rank: int | None
    machines: int
    processes: int
    address: str
    port: int
    backend: str = "static"
    timeout: float = 900.0
    hosts_store: bool | None = None
    quiet: bool = False


def join(config: RendezvousConfig) -> StaticRendezvous:
    """Joins the rendezvous and waits for the other machines.

    Raises:
        SettingsError: at once, if the options of this machine cannot be right.
        RendezvousError: if a machine does not come in time, machine 0 cannot be reached, or another machine has failed.
    """
    rendezvous = StaticRendezvous(config)
    try:
        rendezvous.open()
        rendezvous.register()
    except KeyboardInterrupt:
        rendezvous.cancel(f"{rendezvous.node_name} was interrupted")
        raise
    return rendezvous


class StaticRendezvous:
    """The rendezvous of one launch.

    Attributes:
        config: The options.
        node_name: This machine, for messages: ``machine 0 (host)``.
        endpoint: The main address and port, for messages.
        hosts_store: Whether this machine hosts the store.
        store: The store, once it is open.
        address: The main address as an IP address.
        owns_address: Whether that is an address of this machine.
        store_host: The machine that hosts the store, for messages.
    """

    def __init__(self, config: RendezvousConfig) -> None:
        self.config = config
        self.host = socket.gethostname()
        self.node_name = (
            f"this machine ({self.host})" if config.rank is None else f"machine {config.rank} ({self.host})"
        )
        self.endpoint = (
            f"[{config.address}]:{config.port}" if ":" in config.address else f"{config.address}:{config.port}"
        )
        self._registered = False
        self.store_host = "machine 0"
        self.token = uuid.uuid4().hex
        self.store: TCPStore | None = None
        try:
            self.address = network.resolve(config.address)
        except network.HostNotFoundError as error:
            raise SettingsError(
                f"{self.node_name} cannot look up the main address: {error}. See --main_process_ip."
            ) from None
        self.owns_address = network.is_local_address(self.address)
        by_default = self.owns_address if config.rank is None else config.rank == 0
        self.hosts_store = by_default if config.hosts_store is None else config.hosts_store
        self._deadline = time.monotonic() + config.timeout
        self._log_at = time.monotonic() + _LOG_AFTER_SECONDS

    # The store ---------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens the store, here or at the main address."""
        self.store = self._host_store() if self.hosts_store else self._connect_store()

    def connect(self) -> TCPStore:
        """Opens another connection to the store, for another thread."""
        here = self.hosts_store and not self.owns_address
        loopback = "::1" if ":" in self.address else LOOPBACK
        return _tcp_store(loopback if here else self.address, self.config.port, _STORE_SECONDS)

    def _host_store(self) -> TCPStore:
        if not self.owns_address:  # behind address translation, perhaps; or this is not machine 0
            self._probe_host(_PROBE_SECONDS)
            log_line(
                f"{self.address} is no address of {self.node_name}, which listens on all it has", self.config.quiet
            )
        try:
            listening = network.listen(self.address, self.config.port, everywhere=not self.owns_address)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "another program has taken the port" if taken else str(error.strerror).lower()
            raise SettingsError(
                f"{self.node_name} cannot listen on {self.endpoint}: {reason}. Choose another port with"
                " --main_process_port, the same on all machines."
            ) from None
        address = self.address if self.owns_address else ("::1" if ":" in self.address else LOOPBACK)
        fd = listening.detach()
        # Before torch 2.7, libuv's store does not accept a socket.
        store = _tcp_store(
            address, self.config.port, _STORE_SECONDS, is_master=True, master_listen_fd=fd, use_libuv=False
        )
        store.set(f"{_KEY}/store_host", self._node_record())
        return store

    def _connect_store(self) -> TCPStore:
        while True:
            left = self._deadline - time.monotonic()
            reason = self._probe_host(min(left, _PROBE_SECONDS))
            if reason is None:
                found = self._try_store(min(max(left, 1.0), _PROBE_SECONDS))
                if not isinstance(found, str):
                    return found
                reason = found
            if left <= 0:
                raise RendezvousError(
                    f"{self.node_name} tried for {self.config.timeout:g} s to reach machine 0 at {self.endpoint}: {reason}."
                    " Is machine 0 running, with the same --main_process_ip and --main_process_port?"
                )
            self._log_waiting(f"machine 0 at {self.endpoint} ({reason})")
            time.sleep(_POLL_SECONDS)

    def _probe_host(self, seconds: float) -> str | None:
        try:
            return network.try_connect(self.address, self.config.port, seconds)
        except network.NoRouteError as error:
            raise SettingsError(
                f"{self.node_name}: {error.strerror}. See --main_process_ip, {self.config.address}."
            ) from None

    def _try_store(self, seconds: float) -> TCPStore | str:
        """Returns a connection to the store, or the reason why there is none."""
        import torch.distributed as dist

        connected: list[TCPStore] = []

        def connect() -> None:
            try:
                store = _tcp_store(self.address, self.config.port, seconds)
                store.wait([f"{_KEY}/store_host"], datetime.timedelta(seconds=seconds))
            except (dist.DistError, ValueError, OSError):  # the list stays empty
                return
            store.set_timeout(datetime.timedelta(seconds=_STORE_SECONDS))
            connected.append(store)

        # In a thread: torch blocks forever on a program that accepts the connection and does not answer.
        attempt = threading.Thread(target=connect, daemon=True)
        attempt.start()
        attempt.join(seconds)
        return connected[0] if connected else "something other than `accelerate launch` answers on that port"

    # Registration ------------------------------------------------------------------------------------------------------

    def register(self) -> None:
        """Registers this machine and waits until all have registered.

        Raises:
            SettingsError: if options differ between machines, or two machines have the same rank.
            RendezvousError: if a machine is missing at the end of the timeout, or another machine has failed.
        """
        import torch.distributed as dist

        assert self.store is not None
        try:
            main = json.loads(self.store.get(f"{_KEY}/store_host"))
            self.store_host = _node_name(main)
            self._check_consistency(main)
            index = self.store.add(f"{_KEY}/arrived", 1) - 1
            if index >= self.config.machines and self.config.backend == "c10d":
                return  # it replaces a machine that is gone: torch's rendezvous admits it, or does not
            self._claim_rank()
            self.store.set(f"{_KEY}/machine/{index}", self._node_record())
            self._wait_for_all()
        except dist.DistError:
            raise RendezvousError(
                f"{self.node_name} has lost machine 0 at {self.endpoint} while machines were still missing: look at what "
                "machine 0 has printed"
            ) from None

    def _node_record(self) -> str:
        shared = {name: getattr(self.config, name) for name in ("rank", *_SHARED_OPTIONS)}
        return json.dumps({**shared, "host": self.host, "version": __version__, "token": self.token})

    def _check_consistency(self, main: Mapping[str, Any]) -> None:
        """Compares the options of this machine with those of the machine that hosts the store."""
        for name, flag in _SHARED_OPTIONS.items():
            here, there = getattr(self.config, name), main[name]
            if here != there:
                self._abort(
                    f"{self.node_name} has {flag} {here}, but {_node_name(main)} has {flag} {there}: it must be the same "
                    "on all machines"
                )
        if main["version"] != __version__:
            log_line(
                f"accelerate {__version__} is installed on {self.node_name}, {main['version']} on {_node_name(main)}",
                self.config.quiet,
            )

    def _claim_rank(self) -> None:
        rank, store = self.config.rank, self.store
        if rank is None or store is None:
            return
        if store.add(f"{_KEY}/rank/{rank}", 1) > 1:
            other = store.get(f"{_KEY}/rank/{rank}/host").decode()
            self._abort(
                f"--machine_rank {rank} was given twice, on {other} and on {self.host}: each of the "
                f"{self.config.machines} machines needs a rank of its own, from 0"
            )
        store.set(f"{_KEY}/rank/{rank}/host", self.host)

    def _wait_for_all(self) -> None:
        store, machines = self.store, self.config.machines
        assert store is not None
        self._registered = True
        if store.add(f"{_KEY}/here", 1) == machines:
            store.compare_set(f"{_KEY}/outcome", "", _COMPLETE)
        while not store.check([f"{_KEY}/outcome"]):
            if self.hosts_store and not self.owns_address:
                self._check_for_second_host()
            if time.monotonic() > self._deadline:
                text = (
                    f"{self.node_name} waited {self.config.timeout:g} s at {self.endpoint}: {self._describe_missing()}"
                )
                text += ". Look at what was printed there; --rdzv_conf timeout=SECONDS waits longer."
                if self.cancel(text) == text:
                    raise RendezvousError(text)
            self._log_waiting(f"the others at {self.endpoint}: {self._describe_missing()}")
            time.sleep(_POLL_SECONDS)
        outcome = store.get(f"{_KEY}/outcome").decode()
        if outcome != _COMPLETE:
            self._acknowledge_outcome()
            raise RendezvousError(outcome)

    def _check_for_second_host(self) -> None:
        """Raises if another machine hosts a store at the main address, which this machine does not own.

        Behind address translation, the address may still lead to the store of this machine: its token is the same then.
        """
        found = self._try_store(_PROBE_SECONDS) if self._probe_host(_PROBE_SECONDS) is None else ""
        if isinstance(found, str):
            return
        other = json.loads(found.get(f"{_KEY}/store_host"))
        if other["token"] != self.token:
            text = (
                f"two machines host the rendezvous at {self.endpoint}: {_node_name(other)}, which owns the address, and "
                f"{self.node_name}. Each machine needs a --machine_rank of its own"
            )
            found.compare_set(f"{_KEY}/outcome", "", text)
            self._abort(text)

    def _describe_missing(self) -> str:
        store, machines = self.store, self.config.machines
        assert store is not None
        keys = [f"{_KEY}/machine/{index}" for index in range(machines)]
        here = [json.loads(store.get(key)) for key in keys if store.check([key])]
        if any(node["rank"] is None for node in here):
            return f"of {machines} machines, only {' and '.join(node['host'] for node in here)} came"
        ranks = {node["rank"] for node in here}
        missing = [str(rank) for rank in range(machines) if rank not in ranks]
        which = f"machine {missing[0]} has" if len(missing) == 1 else f"machines {', '.join(missing)} have"
        return f"of {machines} machines, {which} not come"

    def _log_waiting(self, reason: str) -> None:
        if time.monotonic() > self._log_at:
            self._log_at = float("inf")
            log_line(f"{self.node_name} waits for {reason}, for {self.config.timeout:g} s at most", self.config.quiet)

    def _abort(self, text: str) -> NoReturn:
        self.cancel(text)
        raise SettingsError(text + ".")

    def cancel(self, text: str) -> str:
        """Cancels the rendezvous on all machines.

        Args:
            text: The reason, which the machines that wait will raise.

        Returns:
            The outcome of the rendezvous: `text`, unless it had an outcome before.
        """
        if self.store is None:  # the import of torch may have been interrupted, and cannot be repeated
            return text
        import torch.distributed as dist

        try:
            outcome = self.store.compare_set(f"{_KEY}/outcome", "", text).decode()
        except dist.DistError:  # canceled before: the store is closed
            return text
        if outcome != _COMPLETE:
            self._acknowledge_outcome()
        return outcome

    def _acknowledge_outcome(self) -> None:
        """Acknowledges the outcome; the machine that hosts the store keeps it open until all have acknowledged."""
        store, deadline = self.store, time.monotonic() + _LINGER_SECONDS
        assert store is not None
        store.add(f"{_KEY}/acknowledged", int(self._registered))
        while self.hosts_store and time.monotonic() < deadline:
            if store.add(f"{_KEY}/acknowledged", 0) >= store.add(f"{_KEY}/here", 0):
                return
            time.sleep(_POLL_SECONDS / 2)


class StaticRendezvousHandler:
    """A rendezvous handler for torch's elastic agent; duck-typed, as the base class imports torch.

    A machine whose rank has failed requests a restart from all. No machine starts its ranks before all have entered the
    next round.

    Args:
        rendezvous: The completed rendezvous.

    Attributes:
        peers: Set by the agent, round by round.
    """

    use_agent_store = True

    def __init__(self, rendezvous: StaticRendezvous) -> None:
        self.rendezvous = rendezvous
        self.peers: PeerMonitor | None = None
        self._round = -1

    def next_rendezvous(self) -> RendezvousInfo:
        """Enters the next round and waits until all machines have."""
        import torch.distributed as dist
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        config, store = self.rendezvous.config, self.rendezvous.store
        assert store is not None and config.rank is not None
        self._round += 1
        if self._round > 0:
            self._restart_barrier()
        return RendezvousInfo(
            dist.PrefixStore(f"{_KEY}/round/{self._round}", store),
            config.rank,
            config.machines,
            RendezvousStoreInfo(config.address, config.port),
        )

    def _restart_barrier(self) -> None:
        config, store, peers = self.rendezvous.config, self.rendezvous.store, self.peers
        assert store is not None and peers is not None
        peers.request_restart()
        deadline = time.monotonic() + config.timeout
        key = f"{_KEY}/restart/{self._round}"
        store.add(key, 1)
        while store.add(key, 0) < config.machines:
            peers.check()
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"{self.rendezvous.node_name} waited {config.timeout:g} s at {self.rendezvous.endpoint} for all "
                    f"{config.machines} machines to start their ranks again, and {store.add(key, 0)} did"
                )
            time.sleep(_POLL_SECONDS)

    def num_nodes_waiting(self) -> int:
        return int(self.peers is not None and self.peers.restart_requested)

    def get_backend(self) -> str:
        return "static"

    def get_run_id(self) -> str:
        return "accelerate"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Does nothing: the other machines learn of an exit from `PeerMonitor`."""

    def shutdown(self) -> bool:
        return True


def _node_name(node: Mapping[str, Any]) -> str:
    return f"machine {node['rank']} ({node['host']})" if node["rank"] is not None else f"machine {node['host']}"


def _tcp_store(address: str, port: int, seconds: float, **options: Any) -> TCPStore:
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=seconds)
    return dist.TCPStore(address, port, timeout=timeout, wait_for_workers=False, **options)
