"""Where output lies: a local folder or an fsspec prefix, with atomic writes and a lock.

Local files are written beside their final name, synced and renamed, so that no reader ever sees half a file. Object
stores only show finished uploads; other remote file systems get an upload under a temporary name and a move.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import fsspec

from zscore.errors import OutputError, OutputLockedError, UsageError
from zscore.lease import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator

# An upload to these is invisible until it is complete.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"})


class Store(Protocol):
    """A folder of output files."""

    def path(self, name: str) -> str:
        """Full path or url of a file, for messages."""

    def names(self) -> set[str]:
        """Finished files in the folder; empty where it doesn't exist."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading (seekable)."""

    def write(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Write a file that appears whole or not at all; an exception inside leaves nothing behind."""

    def delete(self, name: str) -> None:
        """Remove a file; no error where it is gone."""

    def delete_folder(self) -> None:
        """Remove the folder and all in it."""

    def lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold a lock, or raise OutputLockedError at once."""


def split_out(out: str) -> tuple[str, str]:
    """Folder and file name of an output path or url.

    Raises:
        UsageError: there is no file name in it.
    """
    head, _, name = out.rpartition("/")
    if not name:
        raise UsageError(f"--out '{out}' has no file name: give something like scores.parquet")
    return (head or ("/" if out.startswith("/") else ".")), name


def open_store(folder: str) -> Store:
    """The store for a local folder or an fsspec url.

    Raises:
        UsageError: the protocol isn't known or its package isn't installed.
    """
    protocol = folder.partition("://")[0] if "://" in folder else "file"
    if protocol in {"file", "local"}:
        return LocalStore(Path(folder.removeprefix("file://").removeprefix("local://")))
    try:
        return RemoteStore(folder, protocol)
    except (ImportError, ValueError) as error:
        raise UsageError(f"can't write to {folder}: {error}") from error


def is_local(url: str) -> bool:
    """Whether a path or url is on this machine's file system."""
    return "://" not in url or url.startswith(("file://", "local://"))


class LocalStore:
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> str:
        """See `Store`."""
        return str(self._folder / name)

    def names(self) -> set[str]:
        """See `Store`."""
        try:
            return {entry.name for entry in os.scandir(self._folder) if not _is_temporary(entry.name)}
        except FileNotFoundError:
            return set()

    def open(self, name: str) -> IO[bytes]:
        """See `Store`."""
        return (self._folder / name).open("rb")

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """See `Store`."""
        final = self._folder / name
        with _as_output_error(str(final)):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=f".{name}.", suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    yield stream
                    stream.flush()
                    os.fchmod(stream.fileno(), 0o666 & ~_umask())
                    os.fsync(stream.fileno())
                Path(temporary).replace(final)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            _sync_folder(self._folder)

    def delete(self, name: str) -> None:
        """See `Store`."""
        (self._folder / name).unlink(missing_ok=True)

    def delete_folder(self) -> None:
        """See `Store`."""
        for entry in list(os.scandir(self._folder)) if self._folder.is_dir() else []:
            Path(entry.path).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._folder.rmdir()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """See `Store`: an advisory lock that the kernel drops with the process, however it ends."""
        file = self._folder / name
        with _as_output_error(str(file)):
            descriptor = self._locked(file)
        try:
            # Whoever was killed while writing left a temporary file; we are alone now.
            for entry in list(os.scandir(self._folder)):
                if _is_temporary(entry.name):
                    Path(entry.path).unlink(missing_ok=True)
            yield
        finally:
            file.unlink(missing_ok=True)
            os.close(descriptor)

    def _locked(self, file: Path) -> int:
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one before us may have removed the file between our open and our lock.
                if file.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise OutputLockedError(
                    f"another run is writing to {self._folder}: wait for it to end, or give another --out"
                ) from None
            except FileNotFoundError:
                pass
            os.close(descriptor)


class RemoteStore:
    """A prefix on any file system that fsspec knows."""

    def __init__(self, folder: str, protocol: str) -> None:
        self._url = folder.rstrip("/")
        self._fs, self._prefix = fsspec.core.url_to_fs(self._url)
        self._prefix = self._prefix.rstrip("/")
        self._uploads_are_atomic = protocol in OBJECT_STORES

    def path(self, name: str) -> str:
        """See `Store`."""
        return f"{self._url}/{name}"

    def names(self) -> set[str]:
        """See `Store`."""
        self._fs.invalidate_cache()
        with _as_output_error(self._url):
            try:
                listed = self._fs.ls(self._prefix, detail=False)
            except FileNotFoundError:
                return set()
        return {entry.rsplit("/", 1)[-1] for entry in listed}

    def open(self, name: str) -> IO[bytes]:
        """See `Store`."""
        stream: IO[bytes] = self._fs.open(f"{self._prefix}/{name}", "rb")
        return stream

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """See `Store`: written to a local temporary file first, then uploaded in one go."""
        final = f"{self._prefix}/{name}"
        with _as_output_error(self.path(name)), tempfile.NamedTemporaryFile(prefix="zscore-") as stream:
            yield stream
            stream.flush()
            if self._uploads_are_atomic:
                self._fs.put_file(stream.name, final)
            else:
                self._fs.makedirs(self._prefix, exist_ok=True)
                self._fs.put_file(stream.name, f"{final}.tmp")
                self._fs.mv(f"{final}.tmp", final)

    def delete(self, name: str) -> None:
        """See `Store`."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._prefix}/{name}")

    def delete_folder(self) -> None:
        """See `Store`."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._prefix, recursive=True)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """See `Store`: a lease that is renewed while we live."""
        with _as_output_error(self.path(name)):
            lease = Lease(self._fs, f"{self._prefix}/{name}", self.path(name))
            lease.acquire()
        try:
            yield
        finally:
            lease.release()


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_output_error(where: str) -> Iterator[None]:
    """Operating-system errors as one line that says what to do; ours pass through."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        fix = "free some space; finished shards are kept and the same command resumes"
        if error.errno not in {28, 122, 27}:  # ENOSPC, EDQUOT, EFBIG
            fix = "check that the folder exists and that you may write there; finished shards are kept"
        raise OutputError(f"can't write {where}: {error.strerror or error}: {fix}") from error
