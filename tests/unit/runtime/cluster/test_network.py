"""Names, interfaces and ports, asked of this machine's loopback interface."""

from __future__ import annotations

import socket

import psutil
import pytest

from accelerate.runtime.cluster import network


def test_names_and_addresses() -> None:
    assert network.resolve("127.0.0.1") == "127.0.0.1" and network.resolve("::1") == "::1"
    assert network.resolve("localhost") == "127.0.0.1"
    assert network.is_local_address("127.0.0.1") and not network.is_local_address("192.0.2.1")
    with pytest.raises(network.HostNotFoundError, match="cannot be resolved"):
        network.resolve("a name..with mistakes")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("a.b", False)],
)
def test_what_reaches_this_machine_only(name: str, expected: bool) -> None:
    assert network.is_loopback(name) is expected


def test_interfaces() -> None:
    assert network.interface("127.0.0.1") in ("lo", "lo0") and network.interface("localhost") in ("lo", "lo0")
    assert network.interface(None) is None and network.interface("a name..with mistakes") is None
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and not network.is_loopback(address.address):
                assert network.interface(address.address) == name
                assert network.local_address(address.address) == address.address


def test_doors() -> None:
    with network.listen("127.0.0.1", 0) as open_door:
        port = open_door.getsockname()[1]
        assert network.try_connect("127.0.0.1", port, 1.0) is None
        with pytest.raises(OSError):
            network.listen("127.0.0.1", port)
    assert network.try_connect("127.0.0.1", port, 1.0) == "connection refused: nothing listens on that port"
    with network.listen("127.0.0.1", 0, everywhere=True) as open_door:
        assert open_door.getsockname()[0] == "0.0.0.0"


def test_no_answer_and_no_way() -> None:
    with socket.socket() as full:  # a queue that is full: further connections get no answer
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        assert "timeout: the machine is off, or a firewall" in (network.try_connect("127.0.0.1", port, 0.3) or "")
        for one in waiting:
            one.close()
    with pytest.raises(network.NoRouteError, match="no route to 255.255.255.255"):
        network.try_connect("255.255.255.255", 80, 0.3)
