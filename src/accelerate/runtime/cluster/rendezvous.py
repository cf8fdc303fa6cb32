"""How a process finds its peers: meets them at the place `runtime.cluster.cluster_env` has read, and says who is missing.

`meet` opens the store and waits until every rank has checked in, so that a rank that never comes is named instead of a
bare timeout.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch.distributed as dist

from ...settings import env
from .cluster_env import LOOPBACK, RankInfo
from .network import HostNotFoundError, interface, is_local_address, resolve


def export_torchrun_env(place: RankInfo) -> None:
    """Sets torchrun's variables: torch's own helpers and the user's code read those, and MPI and SLURM set others."""
    env.publish(
        {
            "RANK": place.rank,
            "WORLD_SIZE": place.size,
            "LOCAL_RANK": place.local_rank,
            "LOCAL_WORLD_SIZE": place.local_size,
            "MASTER_ADDR": place.address or None,
            "MASTER_PORT": place.port,
        }
    )


def init_store(place: RankInfo, init_method: str | None, timeout: datetime.timedelta) -> dist.Store:
    """Opens the store of the run and waits until every rank has checked in.

    Raises:
        RuntimeError: within `timeout`, when the main process cannot be reached, its port is taken, or ranks are missing.
    """
    export_torchrun_env(place)
    store = _open_store(place, init_method, timeout)
    _set_gloo_interface(place, init_method)
    # Processes may leave and join again on one store: each round of `size` check-ins has keys of its own.
    arrived = store.add("accelerate/arrived", 1)
    round_, last = (arrived - 1) // place.size, arrived % place.size == 0
    store.set(f"accelerate/{round_}/rank/{place.rank}", socket.gethostname())
    if last:
        store.set(f"accelerate/{round_}/complete", "1")
    try:
        store.wait([f"accelerate/{round_}/complete"], timeout)
    except dist.DistError as error:
        here = [rank for rank in range(place.size) if store.check([f"accelerate/{round_}/rank/{rank}"])]
        missing = [rank for rank in range(place.size) if rank not in here]
        raise RuntimeError(
            f"rank {place.rank} of {place.size} waited {timeout.total_seconds():g} s for "
            f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))} to join and gave up. Look at "
            "what those processes printed: they may have failed, or be busy before they create Accelerator or "
            "PartialState. A longer wait: InitProcessGroupKwargs(timeout=...)."
        ) from error
    return dist.PrefixStore(f"accelerate/{round_}/group", store)


def _set_gloo_interface(place: RankInfo, init_method: str | None) -> None:
    """Has gloo use the way to the main process; left alone, it takes whatever this machine's name stands for."""
    if init_method is None and env.get("GLOO_SOCKET_IFNAME") is None:
        found = interface(place.address)
        if found is not None:
            env.publish({"GLOO_SOCKET_IFNAME": found})


# The store last used, kept open: a peer that joins again must not find the old one closing under its hands.
_last_store: tuple[str, dist.Store] | None = None


def _open_store(place: RankInfo, init_method: str | None, timeout: datetime.timedelta) -> dist.Store:
    global _last_store
    where = init_method or f"{place.address}:{place.port}"
    key = f"{where} {place.rank}/{place.size} {env.get('TORCHELASTIC_RESTART_COUNT')}"
    if _last_store is not None and _last_store[0] == key and _is_alive(_last_store[1]):
        return _last_store[1]
    try:
        if init_method is None:
            store = _tcp_store(place, timeout)
        else:
            store, _, _ = next(dist.rendezvous(init_method, place.rank, place.size, timeout=timeout))
        _last_store = (key, store)
        return store
    except (dist.DistError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise RuntimeError(
                f"rank 0 cannot listen on {where}: the port is taken. Choose another with --main_process_port or "
                "MASTER_PORT (0 lets the launcher pick a free one)."
            ) from error
        raise RuntimeError(
            f"rank {place.rank} of {place.size} could not meet its peers at {where} within "
            f"{timeout.total_seconds():g} s (placed by {place.source}). Check that rank 0 is running, that "
            "MASTER_ADDR and MASTER_PORT name its machine and port on every rank, and that no firewall is between them. "
            f"torch says: {error}"
        ) from error


def _is_alive(store: dist.Store) -> bool:
    try:
        store.check(["accelerate/arrived"])
    except dist.DistError:  # its server went with an earlier run
        return False
    return True


def _tcp_store(place: RankInfo, timeout: datetime.timedelta) -> dist.Store:
    # torch's own env:// handler would wait for all ranks inside the constructor, and could not say who is missing.
    agent = env.flag("TORCHELASTIC_USE_AGENT_STORE")
    serves = place.rank == 0 and not agent
    if serves and place.address_source and not _is_local_host(place.address):
        raise RuntimeError(
            f"rank 0 runs on {socket.gethostname()}, but its peers look for it at {place.address}, which "
            f"{place.address_source} led to: set MASTER_ADDR to the address of rank 0's machine, on every rank."
        )
    options: dict[str, Any] = {"timeout": timeout, "wait_for_workers": False, "multi_tenant": True}
    if serves and place.address in (LOOPBACK, "localhost"):
        # Bound here, the store listens on the loopback interface only; torch would listen on all of them.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, place.port))
            listener.listen(128)
            options["master_listen_fd"] = listener.detach()  # the store closes it
            options["use_libuv"] = False  # before torch 2.7, libuv's store takes no socket
    store = dist.TCPStore(place.address, place.port, place.size, serves, **options)
    if agent:
        return dist.PrefixStore(f"/worker/attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _is_local_host(host: str) -> bool:
    """Whether the host, by name or address, is this machine."""
    try:
        return is_local_address(resolve(host))
    except HostNotFoundError:  # connecting to it says so better
        return True
