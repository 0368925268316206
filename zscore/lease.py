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
        if holder is not None and not _is_dead(holder):
            age = time.time() - holder["renewed"]
            raise OutputLockedError(
                f"another run (process {holder['pid']} on {holder['host']}) is writing to {self._shown}, last seen"
                f" {age:.0f} s ago: wait for it to end, or, if it was killed, {STALE_SECONDS:.0f} s"
            )
        self._write(create=holder is None)
        # Stores without conditional writes let two runs get here; the last writer wins and the other one sees it.
        mine = self._read()
        if mine is None or mine["token"] != self._token:
            raise OutputLockedError(f"another run has just begun to write to {self._shown}")
        self._thread.start()

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            holder = self._read()
            if holder is not None and holder["token"] == self._token:
                self._fs.rm_file(self._path)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # a renewal may fail; the next one, or the next write, tells
                self._write(create=False)

    def _read(self) -> dict[str, Any] | None:
        self._fs.invalidate_cache()
        try:
            holder: dict[str, Any] = json.loads(self._fs.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:  # cut off while it was written, on a store without atomic writes
            return None
        return holder

    def _write(self, *, create: bool) -> None:
        holder = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(), "renewed": time.time()}
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
    return holder["host"] == socket.gethostname() and not Path(f"/proc/{holder['pid']}").exists()
