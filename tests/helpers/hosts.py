"""Two "machines" on this one: network namespaces with a cable between them, each with a host name of its own.

Needs Linux, root and iproute2; `missing()` says which of them is not there. As on Debian, a host's own name stands for
127.0.1.1.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path("/etc/netns")


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt-get install {package})"
    if os.geteuid() != 0:
        return "making network namespaces takes root's rights"
    probe = f"accelerate-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"`ip netns add` is refused here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return None


class Host:
    """One machine.

    Args:
        name: Its namespace, and its host name.
        address: Its address, once a cable is there.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        (FOLDER / name).mkdir(parents=True)
        self.call_itself("127.0.1.1")
        (FOLDER / name / "resolv.conf").write_text("")
        subprocess.run(["ip", "netns", "add", name], check=True)
        self.ip("link", "set", "lo", "up")

    def call_itself(self, address: str) -> None:
        """Has the host's own name stand for `address`."""
        names = f"127.0.0.1 localhost\n{address} {self.name}\n10.77.0.1 first\n10.77.0.2 second\n"
        (FOLDER / self.name / "hosts").write_text(names)

    def ip(self, *words: str) -> str:
        """Runs `ip` on this host."""
        return subprocess.run(["ip", "-n", self.name, *words], check=True, capture_output=True, text=True).stdout

    def start(self, *words: str, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Starts a command on this host; the process is the command's own."""
        inside = [
            "ip",
            "netns",
            "exec",
            self.name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            'hostname "$0"; exec "$@"',
            self.name,
        ]
        return subprocess.Popen(
            [*inside, *words], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def processes(self) -> list[int]:
        """What runs on this host."""
        return [int(pid) for pid in self._netns("pids").split()]

    def listeners(self) -> list[str]:
        """Addresses on which anything on this host listens, with their ports."""
        found = subprocess.run(
            ["ip", "netns", "exec", self.name, "ss", "-Hltn"], check=True, capture_output=True, text=True
        )
        return [line.split()[3] for line in found.stdout.splitlines()]

    def block(self, port: int) -> None:
        """A firewall: no answer from `port` leaves this host."""
        self.ip("rule", "add", "sport", str(port), "blackhole")

    def remove(self) -> None:
        """Ends what runs here, and removes the host."""
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        self._netns("del")
        shutil.rmtree(FOLDER / self.name, ignore_errors=True)

    def _netns(self, what: str) -> str:
        done = subprocess.run(["ip", "netns", what, self.name], capture_output=True, text=True, check=False)
        return done.stdout


def two_hosts() -> tuple[Host, Host]:
    """Makes two hosts with a cable between them, 10.77.0.1 and 10.77.0.2; `Host.remove` each."""
    first = Host(f"acc{os.getpid()}a", "10.77.0.1")
    second = Host(f"acc{os.getpid()}b", "10.77.0.2")
    first.ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", second.name)
    for host in (first, second):
        host.ip("addr", "add", f"{host.address}/24", "dev", "veth0")
        host.ip("link", "set", "veth0", "up")
    return first, second
