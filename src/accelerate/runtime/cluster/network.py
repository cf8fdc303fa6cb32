"""Addresses, interfaces and ports: what a name stands for, which way leads there, what answers. Without torch.

The launcher and the ranks ask here which interface a group shall use, so that neither depends on what this machine's own
name stands for (on Debian that is 127.0.1.1, where no other machine can answer).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time

# How long a name server that cannot be asked is asked again.
_DNS_RETRY_SECONDS = 5.0
# Reasons for which another attempt to connect would end in the same way.
_PERMANENT_ERRORS = frozenset(
    {errno.ENETUNREACH, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
)


class HostNotFoundError(OSError):
    """A name that stands for no address."""


class NoRouteError(OSError):
    """An address that this machine has no way to: trying again makes no sense."""


def resolve(name: str) -> str:
    """The first address that `name` (which may be an address) stands for.

    Raises:
        HostNotFoundError: when there is none.
    """
    deadline = time.monotonic() + _DNS_RETRY_SECONDS
    while True:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
        except (socket.gaierror, UnicodeError) as error:
            again = getattr(error, "errno", None) == socket.EAI_AGAIN and time.monotonic() < deadline
            if not again:
                raise HostNotFoundError(f"the name {name!r} stands for no address ({_error_text(error)})") from None
            time.sleep(0.5)


def is_loopback(name: str) -> bool:
    """Whether `name` stands for this machine only."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def local_address(towards: str, port: int = 9) -> str | None:
    """The address by which this machine is known where `towards` is; None when there is no way there. Sends nothing."""
    try:
        with socket.socket(_family(towards), socket.SOCK_DGRAM) as probe:
            probe.connect((towards, port))
            return str(probe.getsockname()[0])
    except OSError:  # no such network here
        return None


def interface(towards: str | None) -> str | None:
    """The name of the network interface that leads to `towards`, an address or a name; None when that cannot be said."""
    if towards is None:
        return None
    if is_loopback(towards):
        return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    try:
        own = local_address(resolve(towards))
    except HostNotFoundError:
        return None
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if own is not None and any(own == address.address.partition("%")[0] for address in addresses):
            return name
    return None


def is_local_address(address: str) -> bool:
    """Whether `address` is one of this machine's."""
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def listen(address: str, port: int, everywhere: bool = False) -> socket.socket:
    """A socket that listens; port 0 takes any free one.

    Args:
        address: One of this machine's.
        port: The port wanted.
        everywhere: Listen on all addresses of the same kind instead.

    Raises:
        OSError: when the port is taken, or the address is not this machine's.
    """
    listening = socket.socket(_family(address), socket.SOCK_STREAM)
    # A port whose last user has just ended is free; on Linux this does not let two listen.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("" if everywhere else address, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening


def try_connect(address: str, port: int, seconds: float) -> str | None:
    """Tries to connect once.

    Returns:
        None when somebody answers, else what is in the way, in words.

    Raises:
        NoRouteError: when another attempt would end in the same way.
    """
    try:
        socket.create_connection((address, port), timeout=max(0.1, seconds)).close()
        return None
    except ConnectionRefusedError:
        return "it answers, but nothing listens on that port"
    except TimeoutError:
        return "no answer: the machine is off, or a firewall drops what is sent to that port"
    except OSError as error:
        if error.errno in _PERMANENT_ERRORS:
            raise NoRouteError(error.errno, f"this machine has no way to {address} ({_error_text(error)})") from None
        return _error_text(error).lower()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _error_text(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
