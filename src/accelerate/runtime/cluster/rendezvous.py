"""Rendezvous of the ranks at the address of `cluster_env`, with an error that names missing ranks.

`init_store` opens the TCPStore and blocks until every rank has checked in, so that a timeout can list those that have not.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch.distributed as dist

from ...settings import env
from .cluster_env import LOOPBACK, RankInfo
from .network import HostNotFoundError, interface, is_local_address, resolve


def export_torchrun_env(info: RankInfo) -> None:
    """Exports torchrun's variables, which torch and user code read, in runs of MPI and SLURM too."""
    env.publish(
        {
            "RANK": info.rank,
            "WORLD_SIZE": info.size,
            "LOCAL_RANK": info.local_rank,
            "LOCAL_WORLD_SIZE": info.local_size,
            "MASTER_ADDR": info.address or None,
            "MASTER_PORT": info.port,
        }
    )


def init_store(info: RankInfo, init_method: str | None, timeout: datetime.timedelta) -> dist.Store:
    """Opens the store of the run and blocks until every rank has checked in.

    Raises:
        RuntimeError: within `timeout`, if rank 0 cannot be reached, its port is taken, or ranks are missing.
    """
    export_torchrun_env(info)
    store = _open_store(info, init_method, timeout)
    _set_gloo_interface(info, init_method)
    # Processes may leave and join again on one store, so each round of `size` check-ins has a key prefix of its own.
    arrived = store.add("accelerate/arrived", 1)
    round_, last = (arrived - 1) // info.size, arrived % info.size == 0
    store.set(f"accelerate/{round_}/rank/{info.rank}", socket.gethostname())
    if last:
        store.set(f"accelerate/{round_}/complete", "1")
    try:
        store.wait([f"accelerate/{round_}/complete"], timeout)
    except dist.DistError as error:
        here = [rank for rank in range(info.size) if store.check([f"accelerate/{round_}/rank/{rank}"])]
        missing = [rank for rank in range(info.size) if rank not in here]
        raise RuntimeError(
            f"rank {info.rank} of {info.size} waited {timeout.total_seconds():g} s for "
            f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))} to join and gave up. Check the "
            "output of those processes: they may have failed, or be busy before they create Accelerator or "
            "PartialState. InitProcessGroupKwargs(timeout=...) sets a longer timeout."
        ) from error
    return dist.PrefixStore(f"accelerate/{round_}/group", store)


def _set_gloo_interface(info: RankInfo, init_method: str | None) -> None:
    """Sets gloo's interface to the one on the route to rank 0; by default gloo resolves this machine's hostname."""
    if init_method is None and env.get("GLOO_SOCKET_IFNAME") is None:
        found = interface(info.address)
        if found is not None:
            env.publish({"GLOO_SOCKET_IFNAME": found})


# Kept open, so that peers that join again do not connect to a store that is about to close.
_last_store: tuple[str, dist.Store] | None = None


def _open_store(info: RankInfo, init_method: str | None, timeout: datetime.timedelta) -> dist.Store:
    global _last_store
    where = init_method or f"{info.address}:{info.port}"
    key = f"{where} {info.rank}/{info.size} {env.get('TORCHELASTIC_RESTART_COUNT')}"
    if _last_store is not None and _last_store[0] == key and _is_alive(_last_store[1]):
        return _last_store[1]
    try:
        if init_method is None:
            store = _tcp_store(info, timeout)
        else:
            store, _, _ = next(dist.rendezvous(init_method, info.rank, info.size, timeout=timeout))
        _last_store = (key, store)
        return store
    except (dist.DistError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise RuntimeError(
                f"rank 0 cannot listen on {where}: the port is taken. Choose another with --main_process_port or "
                "MASTER_PORT (0 lets the launcher pick a free one)."
            ) from error
        raise RuntimeError(
            f"rank {info.rank} of {info.size} could not connect to the store at {where} within "
            f"{timeout.total_seconds():g} s (ranks by {info.source}). Check that rank 0 is running, that "
            "MASTER_ADDR and MASTER_PORT name its machine and port on every rank, and that no firewall is between them. "
            f"torch's error: {error}"
        ) from error


def _is_alive(store: dist.Store) -> bool:
    try:
        store.check(["accelerate/arrived"])
    except dist.DistError:  # the server ended with an earlier run
        return False
    return True


def _tcp_store(info: RankInfo, timeout: datetime.timedelta) -> dist.Store:
    # torch's env:// handler blocks in the constructor until all ranks connect, and cannot name the missing ones.
    agent = env.flag("TORCHELASTIC_USE_AGENT_STORE")
    serves = info.rank == 0 and not agent
    if serves and info.address_source and not _is_local_host(info.address):
        raise RuntimeError(
            f"rank 0 runs on {socket.gethostname()}, but its peers connect to {info.address}, guessed from "
            f"{info.address_source}: set MASTER_ADDR to the address of rank 0's machine, on every rank."
        )
    options: dict[str, Any] = {"timeout": timeout, "wait_for_workers": False, "multi_tenant": True}
    if serves and info.address in (LOOPBACK, "localhost"):
        # Listens on the loopback interface only; torch's own socket listens on all.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, info.port))
            listener.listen(128)
            options["master_listen_fd"] = listener.detach()  # the store closes it
            options["use_libuv"] = False  # before torch 2.7, libuv's store takes no socket
    store = dist.TCPStore(info.address, info.port, info.size, serves, **options)
    if agent:
        return dist.PrefixStore(f"/worker/attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _is_local_host(host: str) -> bool:
    """Returns whether a host name or address belongs to this machine."""
    try:
        return is_local_address(resolve(host))
    except HostNotFoundError:  # the connection raises a better error
        return True
