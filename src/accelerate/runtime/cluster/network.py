"""Name resolution, network interfaces, listening and connecting. Imports no torch.

Launcher and ranks choose a group's interface by the route to rank 0, not by this machine's own hostname, which may resolve
to a loopback address (127.0.1.1 on Debian) that other machines cannot reach.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time

# Seconds to retry after a temporary failure of the name server.
_DNS_RETRY_SECONDS = 5.0
# Errors that another attempt to connect would raise again.
_PERMANENT_ERRORS = frozenset(
    {errno.ENETUNREACH, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
)


class HostNotFoundError(OSError):
    """A host name cannot be resolved."""


class NoRouteError(OSError):
    """There is no route to an address, so that retries are useless."""


def resolve(name: str) -> str:
    """Resolves a host name or address to its first address.

    Raises:
        HostNotFoundError: if there is none.
    """
    deadline = time.monotonic() + _DNS_RETRY_SECONDS
    while True:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
        except (socket.gaierror, UnicodeError) as error:
            again = getattr(error, "errno", None) == socket.EAI_AGAIN and time.monotonic() < deadline
            if not again:
                raise HostNotFoundError(f"host name {name!r} cannot be resolved ({_error_text(error)})") from None
            time.sleep(0.5)


def is_loopback(name: str) -> bool:
    """Returns whether a host name or address is a loopback one."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def local_address(towards: str, port: int = 9) -> str | None:
    """Returns this machine's source address for the route to an address, or None without a route. Sends nothing."""
    try:
        with socket.socket(_family(towards), socket.SOCK_DGRAM) as probe:
            probe.connect((towards, port))
            return str(probe.getsockname()[0])
    except OSError:  # no such network here
        return None


def interface(towards: str | None) -> str | None:
    """Returns the name of the network interface on the route to a host, or None if it cannot be determined."""
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
    """Returns whether an address belongs to this machine."""
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def listen(address: str, port: int, everywhere: bool = False) -> socket.socket:
    """Returns a listening socket.

    Args:
        address: An address of this machine.
        port: The port; 0 selects a free one.
        everywhere: Listen on all addresses of the same family instead.

    Raises:
        OSError: if the port is taken, or the address does not belong to this machine.
    """
    listening = socket.socket(_family(address), socket.SOCK_STREAM)
    # Reuses a port in TIME_WAIT; on Linux two sockets still cannot listen on it.
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
        None on success, else a description of the error.

    Raises:
        NoRouteError: if a retry is useless.
    """
    try:
        socket.create_connection((address, port), timeout=max(0.1, seconds)).close()
        return None
    except ConnectionRefusedError:
        return "connection refused: nothing listens on that port"
    except TimeoutError:
        return "timeout: the machine is off, or a firewall drops packets to that port"
    except OSError as error:
        if error.errno in _PERMANENT_ERRORS:
            raise NoRouteError(error.errno, f"no route to {address} ({_error_text(error)})") from None
        return _error_text(error).lower()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _error_text(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
