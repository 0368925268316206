"""A lock on a remote file system: an object that its holder renews, and that others may take once it is stale."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from zscore.errors import OutputLockedError

RENEW_SECONDS = 20.0
# Three missed renewals: the holder is gone, or cut off from the store (then it can't write there either).
STALE_SECONDS = 75.0


class Lease:
    """One lease object; not reusable after `release`."""

    def __init__(self, filesystem: Any, path: str, shown: str) -> None:
        self._fs = filesystem
        self._path = path
        self._shown = shown
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="zscore-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            OutputLockedError: somebody else holds it and has renewed it lately.
        """
        holder = self._read()
        if holder and not _is_dead(holder):
            age = time.time() - holder["renewed"]
            raise OutputLockedError(
                f"another run (process {holder['pid']} on {holder['host']}) is writing to {self._shown}, last seen"
                f" {age:.0f} s ago: wait for it to end, or, if it was killed, {STALE_SECONDS:.0f} s"
            )
        if holder is not None:  # stale, dead or unreadable: of several that see it so, one creates the next
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path)
        self._write(create=True)
        # Stores without conditional writes let two runs get here; the last writer wins and the other one sees it.
        if not self._is_ours():
            raise OutputLockedError(f"another run has just begun to write to {self._shown}")
        self._thread.start()

    def check(self) -> None:
        """Make sure that nobody has taken the lease over, which they may once we couldn't renew it for a while.

        Raises:
            OutputLockedError: somebody has.
        """
        if not self._is_ours():
            raise OutputLockedError(f"another run has taken over {self._shown}: this one stops; what it wrote is kept")

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # a lease that can't be removed goes stale by itself
            if self._is_ours():
                self._fs.rm_file(self._path)

    def _is_ours(self) -> bool:
        return (self._read() or {}).get("token") == self._token

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # clients' errors share no base; the next renewal or `check` tells
                if not self._is_ours():
                    return
                self._write(create=False)

    def _read(self) -> dict[str, Any] | None:
        """The holder; empty where the object can't be understood, None where there is none."""
        self._fs.invalidate_cache()
        try:
            holder = json.loads(self._fs.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:  # cut off while it was written, on a store without atomic writes
            return {}
        return holder if isinstance(holder, dict) and holder.keys() >= {"token", "host", "pid", "renewed"} else {}

    def _write(self, *, create: bool) -> None:
        holder = {"token": self._token, "host": _host(), "pid": os.getpid(), "renewed": time.time()}
        data = json.dumps(holder).encode()
        if create:
            with contextlib.suppress(FileExistsError):
                try:
                    self._fs.pipe_file(self._path, data, mode="create")
                except (TypeError, NotImplementedError):  # a file system without conditional writes
                    self._fs.pipe_file(self._path, data)
        else:
            self._fs.pipe_file(self._path, data)


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder is stale, or a process of this machine that has ended."""
    if time.time() - holder["renewed"] > STALE_SECONDS:
        return True
    return holder["host"] == _host() and not Path(f"/proc/{holder['pid']}").exists()


def _host() -> str:
    """This machine since its last boot, and its process ids' namespace: containers may share a host name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot[:8]} {Path('/proc/self/ns/pid').readlink()}"
