"""A connection to Ray: to a cluster that runs already, or to a Ray that starts and ends with this process."""

from __future__ import annotations

import os
import platform
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

from textgen_env.errors import ClusterError, ConfigError
from textgen_env.extras import require

SMALLEST_STORE = 100_000_000
"""Bytes of Ray's object store where this process starts it; Ray refuses fewer than 75 MiB."""

SAME_EVERYWHERE = ("textgen-env", "torch", "transformers", "gymnasium", "stable-baselines3", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that must be the same on every node, so that all write the same texts."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in SAME_EVERYWHERE}}


def check_versions(theirs: Mapping[str, str], ours: Mapping[str, str], who: str) -> None:
    """Raise ``ClusterError`` unless both are the same."""
    other = [f"{name} {theirs.get(name)} instead of {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
    if other:
        raise ClusterError(f"{who} has {', '.join(other)}: install the same versions on every node")


@contextmanager
def connected(address: str | None, cores: int, timeout: float, store: int) -> Iterator[Any]:
    """Yield the module ``ray``, connected; end the connection, or the Ray started here, afterwards.

    Args:
        address: As of ``agents.distributed.actors.RayTextSource``.
        cores, store: What a Ray that starts here may use: processes at a time, bytes of shared memory.
        timeout: Seconds for the cluster to answer.

    Raises:
        ConfigError: Ray is not installed.
        ClusterError: nothing, or no Ray of this version, answers at ``address``.
    """
    ray = import_ray()
    if ray.is_initialized():  # by the program that calls: it ends it, too
        yield ray
        return
    if address not in (None, "auto"):
        probe(str(address), timeout)
    settings: dict[str, Any] = {"address": address}
    if address is None:
        settings = {"address": "local", "num_cpus": cores, "include_dashboard": False, "object_store_memory": store}
    with _own_sigterm():
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **settings)
        except Exception as error:  # Ray raises bare ones, too, where a machine is too busy for it to start
            ray.shutdown()
            raise ClusterError(f"cannot connect to Ray at {address or 'this machine'}: {error}") from error
        except KeyboardInterrupt:
            ray.shutdown()
            raise
    try:
        yield ray
    finally:
        with _own_sigterm():
            ray.shutdown()


def import_ray() -> Any:
    """Return the module ``ray``.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors may use a GPU that they see
    os.environ.setdefault("RAY_worker_niceness", "0")  # not 15: actors are the run, not its background
    return require("ray", extra="distributed", for_="a Ray cluster")


def probe(address: str, timeout: float) -> None:
    """Raise ``ClusterError`` unless an HTTP/2 server, as Ray's head is one, answers at ``HOST:PORT`` in time.

    Ray itself tries for minutes, and says nothing meanwhile.
    """
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 2**16
    if not host or not host.isascii() or not is_port:
        raise ConfigError(
            f"the address of a cluster is HOST:PORT of its head, with a port from 1 to 65535, or 'auto'; "
            f"got {address!r}"
        )
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as connection:
            connection.sendall(hello)
            answers = connection.recv(4)[3:] == b"\x04"  # the type of a settings frame
    except (OSError, OverflowError, UnicodeError) as error:
        raise ClusterError(
            f"no Ray answers at {address} within {timeout:g} s ({error}): start its head with 'ray start --head', and "
            "see that this machine reaches it"
        ) from error
    if not answers:
        raise ClusterError(f"the server at {address} is no Ray head; give the address that 'ray start --head' says")


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray sets one of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(TypeError):  # None: a handler that Python did not set
            signal.signal(signal.SIGTERM, handler)
