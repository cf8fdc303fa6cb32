"""Several machines meet: a store on machine 0, at which each checks in under its rank with what it was told.

`gather` comes back once all are there. Who is missing, came twice or was told something else is named, and so is what was
tried to reach machine 0. The store listens on the main address only, if that is machine 0's own.
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
from ..console import say

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# After this long a line says what is being waited for.
_PATIENCE_SECONDS = 10.0
_KNOCK_SECONDS = 5.0
POLL_SECONDS = 0.2
_STORE_SECONDS = 60.0
# How long the store stays open for those who have not yet read why there will be no meeting.
_LINGER_SECONDS = 5.0
KEY = "accelerate"
_COMPLETE = "complete"  # the outcome of a meeting; any other says why there was none
# What must be the same on all machines: field of Terms -> how it is given.
_COMMON = {"machines": "--num_machines", "processes": "--num_processes", "backend": "--rdzv_backend"}


def options(text: str) -> dict[str, str]:
    """What --rdzv_conf, ``key=value,key=value``, says.

    Raises:
        SettingsError: when it says nothing that can be understood.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for key, equals, value in pairs:
        if not (key.strip() and equals and value.strip()):
            raise SettingsError(f"--rdzv_conf: expected key=value,key=value, found {text!r}.")
    return {key.strip(): value.strip() for key, _, value in pairs}


def number(found: Mapping[str, Any], *names: str, default: float) -> float:
    """The first of these keys that is in `found`, the options of --rdzv_conf, as a number.

    Raises:
        SettingsError: when it is none.
    """
    for name in names:
        if name in found:
            try:
                return float(found[name])
            except (TypeError, ValueError):
                raise SettingsError(f"--rdzv_conf {name}: expected a number, found {found[name]!r}.") from None
    return default


class NoMeeting(RuntimeError):
    """The machines did not find each other; the message says who waited for whom, and what was tried."""


class Terms(NamedTuple):
    """What this machine was told.

    Attributes:
        rank: Its number; None when nobody said.
        machines: How many machines take part.
        processes: How many processes, over all of them.
        address: The main address: a name or a number.
        port: The port there.
        backend: ``static``, or ``c10d``: machines need no number then, and may be replaced.
        timeout: For how many seconds to wait for the others.
        serves: Whether this machine holds the store; None: if it is machine 0.
        quiet: Whether to keep quiet while waiting.
    """

    rank: int | None
    machines: int
    processes: int
    address: str
    port: int
    backend: str = "static"
    timeout: float = 900.0
    serves: bool | None = None
    quiet: bool = False


def gather(terms: Terms) -> Meeting:
    """Meets the other machines.

    Raises:
        SettingsError: when what this machine was told cannot be right: at once.
        NoMeeting: when the others do not come, machine 0 is not reached in time, or another machine has given up.
    """
    meeting = Meeting(terms)
    try:
        meeting.open()
        meeting.check_in()
    except KeyboardInterrupt:
        meeting.call_off(f"{meeting.me} was interrupted")
        raise
    return meeting


class Meeting:
    """The meeting of one launch.

    Attributes:
        me: This machine, in words.
        serves: Whether the store is here.
        store: The store, once it is open.
        address: The main address as a number.
        holder: The machine that holds the store, in words.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.host = socket.gethostname()
        self.me = f"this machine ({self.host})" if terms.rank is None else f"machine {terms.rank} ({self.host})"
        self.where = f"[{terms.address}]:{terms.port}" if ":" in terms.address else f"{terms.address}:{terms.port}"
        self._waits = False  # among those who wait for the outcome
        self.holder = "machine 0"
        self.token = uuid.uuid4().hex
        self.store: TCPStore | None = None
        try:
            self.address = network.resolve(terms.address)
        except network.HostNotFoundError as error:
            raise SettingsError(f"{self.me} cannot look up the main address: {error}. See --main_process_ip.") from None
        self.own = network.is_local_address(self.address)
        self.serves = (
            (terms.rank == 0 if terms.rank is not None else self.own) if terms.serves is None else terms.serves
        )
        self._deadline = time.monotonic() + terms.timeout
        self._reminder = time.monotonic() + _PATIENCE_SECONDS

    # The store ---------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens the store, here or at the main address."""
        self.store = self._serve() if self.serves else self._reach()

    def connect(self) -> TCPStore:
        """Another connection to the store, for another thread."""
        here = self.serves and not self.own
        loopback = "::1" if ":" in self.address else LOOPBACK
        return _tcp_store(loopback if here else self.address, self.terms.port, _STORE_SECONDS)

    def _serve(self) -> TCPStore:
        if not self.own:  # behind an address translation, perhaps; or this is not machine 0
            self._knock(_KNOCK_SECONDS)
            say(f"{self.address} is no address of {self.me}, which listens on all it has", self.terms.quiet)
        try:
            listening = network.listen(self.address, self.terms.port, everywhere=not self.own)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "another program has taken the port" if taken else str(error.strerror).lower()
            raise SettingsError(
                f"{self.me} cannot listen on {self.where}: {reason}. Choose another port with --main_process_port, the "
                "same on all machines."
            ) from None
        address = self.address if self.own else ("::1" if ":" in self.address else LOOPBACK)
        fd = listening.detach()
        # Before torch 2.7, libuv's store takes no socket.
        store = _tcp_store(
            address, self.terms.port, _STORE_SECONDS, is_master=True, master_listen_fd=fd, use_libuv=False
        )
        store.set(f"{KEY}/meeting", self._view())
        return store

    def _reach(self) -> TCPStore:
        while True:
            left = self._deadline - time.monotonic()
            reason = self._knock(min(left, _KNOCK_SECONDS))
            if reason is None:
                found = self._enter(min(max(left, 1.0), _KNOCK_SECONDS))
                if not isinstance(found, str):
                    return found
                reason = found
            if left <= 0:
                raise NoMeeting(
                    f"{self.me} tried for {self.terms.timeout:g} s to reach machine 0 at {self.where}: {reason}. Is "
                    "machine 0 running, with the same --main_process_ip and --main_process_port?"
                )
            self._remind(f"machine 0 at {self.where} ({reason})")
            time.sleep(POLL_SECONDS)

    def _knock(self, seconds: float) -> str | None:
        try:
            return network.try_connect(self.address, self.terms.port, seconds)
        except network.NoRouteError as error:
            raise SettingsError(f"{self.me}: {error.strerror}. See --main_process_ip, {self.terms.address}.") from None

    def _enter(self, seconds: float) -> TCPStore | str:
        """A connection to the store, or why there is none."""
        import torch.distributed as dist

        entered: list[TCPStore] = []

        def enter() -> None:
            try:
                store = _tcp_store(self.address, self.terms.port, seconds)
                store.wait([f"{KEY}/meeting"], datetime.timedelta(seconds=seconds))
            except (dist.DistError, ValueError, OSError):  # the list stays empty
                return
            store.set_timeout(datetime.timedelta(seconds=_STORE_SECONDS))
            entered.append(store)

        # In a thread, as torch waits without end for a program that takes the connection and says nothing.
        attempt = threading.Thread(target=enter, daemon=True)
        attempt.start()
        attempt.join(seconds)
        return entered[0] if entered else "something else than a meeting of `accelerate launch` answers on that port"

    # Checking in -------------------------------------------------------------------------------------------------------

    def check_in(self) -> None:
        """Says that this machine is here, and waits until all are."""
        import torch.distributed as dist

        assert self.store is not None
        try:
            main = json.loads(self.store.get(f"{KEY}/meeting"))
            self.holder = _words(main)
            self._compare(main)
            place = self.store.add(f"{KEY}/arrived", 1) - 1
            if place >= self.terms.machines and self.terms.backend == "c10d":
                return  # in the place of a machine that is gone: torch's rendezvous lets it in, or not
            self._take_rank()
            self.store.set(f"{KEY}/machine/{place}", self._view())
            self._wait_for_all()
        except dist.DistError:
            raise NoMeeting(
                f"{self.me} has lost machine 0 at {self.where} while machines were still missing: look at what "
                "machine 0 has printed"
            ) from None

    def _view(self) -> str:
        shown = {name: getattr(self.terms, name) for name in ("rank", *_COMMON)}
        return json.dumps({**shown, "host": self.host, "version": __version__, "token": self.token})

    def _compare(self, main: Mapping[str, Any]) -> None:
        """Compares what this machine was told with what the machine of the store was told."""
        for name, flag in _COMMON.items():
            here, there = getattr(self.terms, name), main[name]
            if here != there:
                self._refuse(
                    f"{self.me} was told {flag} {here}, and {_words(main)} {flag} {there}: it must be the same on all "
                    "machines"
                )
        if main["version"] != __version__:
            say(
                f"accelerate {__version__} is installed on {self.me}, {main['version']} on {_words(main)}",
                self.terms.quiet,
            )

    def _take_rank(self) -> None:
        rank, store = self.terms.rank, self.store
        if rank is None or store is None:
            return
        if store.add(f"{KEY}/rank/{rank}", 1) > 1:
            other = store.get(f"{KEY}/rank/{rank}/host").decode()
            self._refuse(
                f"--machine_rank {rank} was given twice, on {other} and on {self.host}: each of the "
                f"{self.terms.machines} machines needs a number of its own, from 0"
            )
        store.set(f"{KEY}/rank/{rank}/host", self.host)

    def _wait_for_all(self) -> None:
        store, machines = self.store, self.terms.machines
        assert store is not None
        self._waits = True
        if store.add(f"{KEY}/here", 1) == machines:
            store.compare_set(f"{KEY}/outcome", "", _COMPLETE)
        while not store.check([f"{KEY}/outcome"]):
            if self.serves and not self.own:
                self._look_for_another()
            if time.monotonic() > self._deadline:
                text = f"{self.me} waited {self.terms.timeout:g} s at {self.where}: {self._missing()}"
                text += ". Look at what was printed there; --rdzv_conf timeout=SECONDS waits longer."
                if self.call_off(text) == text:
                    raise NoMeeting(text)
            self._remind(f"the others at {self.where}: {self._missing()}")
            time.sleep(POLL_SECONDS)
        outcome = store.get(f"{KEY}/outcome").decode()
        if outcome != _COMPLETE:
            self._linger()
            raise NoMeeting(outcome)

    def _look_for_another(self) -> None:
        """Looks who answers at the main address, which is not this machine's own: it may lead here all the same."""
        found = self._enter(_KNOCK_SECONDS) if self._knock(_KNOCK_SECONDS) is None else ""
        if isinstance(found, str):
            return
        other = json.loads(found.get(f"{KEY}/meeting"))
        if other["token"] != self.token:
            text = (
                f"two machines want to hold the meeting at {self.where}: {_words(other)}, whose address that is, and "
                f"{self.me}. Each machine needs a --machine_rank of its own"
            )
            found.compare_set(f"{KEY}/outcome", "", text)
            self._refuse(text)

    def _missing(self) -> str:
        """Which machines are not here yet, in words."""
        store, machines = self.store, self.terms.machines
        assert store is not None
        keys = [f"{KEY}/machine/{place}" for place in range(machines)]
        here = [json.loads(store.get(key)) for key in keys if store.check([key])]
        if any(view["rank"] is None for view in here):
            return f"of {machines} machines, only {' and '.join(view['host'] for view in here)} came"
        ranks = {view["rank"] for view in here}
        missing = [str(rank) for rank in range(machines) if rank not in ranks]
        which = f"machine {missing[0]} has" if len(missing) == 1 else f"machines {', '.join(missing)} have"
        return f"of {machines} machines, {which} not come"

    def _remind(self, of: str) -> None:
        if time.monotonic() > self._reminder:
            self._reminder = float("inf")
            say(f"{self.me} waits for {of}, for {self.terms.timeout:g} s at most", self.terms.quiet)

    def _refuse(self, text: str) -> NoReturn:
        self.call_off(text)
        raise SettingsError(text + ".")

    def call_off(self, text: str) -> str:
        """Tells the machines that are waiting that there will be no meeting, and why.

        Returns:
            The outcome of the meeting: `text`, unless there has been another before.
        """
        if self.store is None:  # torch may have been interrupted while it was imported: it bears no second time
            return text
        import torch.distributed as dist

        try:
            outcome = self.store.compare_set(f"{KEY}/outcome", "", text).decode()
        except dist.DistError:  # it is called off already: the store has gone
            return text
        if outcome != _COMPLETE:
            self._linger()
        return outcome

    def _linger(self) -> None:
        """Says that this machine knows the outcome; the one with the store keeps it open until all who wait do."""
        store, deadline = self.store, time.monotonic() + _LINGER_SECONDS
        assert store is not None
        store.add(f"{KEY}/heard", int(self._waits))
        while self.serves and time.monotonic() < deadline:
            if store.add(f"{KEY}/heard", 0) >= store.add(f"{KEY}/here", 0):
                return
            time.sleep(POLL_SECONDS / 2)


def _words(view: Mapping[str, Any]) -> str:
    return f"machine {view['rank']} ({view['host']})" if view["rank"] is not None else f"machine {view['host']}"


def _tcp_store(address: str, port: int, seconds: float, **options: Any) -> TCPStore:
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=seconds)
    return dist.TCPStore(address, port, timeout=timeout, wait_for_workers=False, **options)
