"""Where output lies: a local folder or an fsspec prefix, with atomic writes and a lock.

Local files are written beside their final name, synced (where that is asked for) and renamed, so that no reader ever
sees half a file. Object stores only show finished uploads; other remote file systems get an upload under a temporary
name and a move.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import fsspec

from zscore.errors import OutputError, OutputLockedError, UsageError
from zscore.lease import Lease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
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

    def delete_if_empty(self) -> None:
        """Remove the folder where nothing is left in it."""

    def adopt(self, folder: str, name: str) -> None:
        """Move a finished file here from a folder inside, in the place of the one that has its name."""

    def sweep(self, is_ours: Callable[[str], bool]) -> None:
        """Remove what a killed run left half-written of files of such names; only for whoever holds their lock."""

    def lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold a lock, or raise OutputLockedError at once."""


# What people may take for a choice of format.
FOREIGN = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xlsx", ".arrow", ".feather", ".html", ".txt", ".tar", ".npy")


def split_out(out: str) -> tuple[str, str]:
    """Folder and file name of an output path or url.

    Raises:
        UsageError: there is no file name in it.
    """
    head, _, name = out.rpartition("/")
    if not name:
        raise UsageError(f"--out '{out}' has no file name: give something like scores.parquet")
    if head.endswith(":/"):
        raise UsageError(f"--out '{out}' names no bucket or folder: give something like {head}/bucket/{name}")
    return (head or ("/" if out.startswith("/") else ".")), name


def refuse_foreign(targets: Mapping[str, str | None]) -> None:
    """Refuse names of tables that ask for another format than parquet.

    Args:
        targets: paths or urls by the option that names them.

    Raises:
        UsageError: names option and path.
    """
    for option, target in targets.items():
        if target is not None and target.lower().endswith(FOREIGN):
            raise UsageError(f"{option} '{target}': tables are written as parquet: give a name that ends in .parquet")


def open_store(folder: str, *, resumes: bool = False, syncs: bool = True) -> Store:
    """The store for a local folder or an fsspec url.

    Args:
        folder: path or url.
        resumes: what is finished there stays when a write fails, and the same command goes on; errors say so.
        syncs: a local file survives a power cut once it has its name; else the system writes it back when it likes,
            as with `cp`.

    Raises:
        UsageError: the protocol isn't known or its package isn't installed.
    """
    protocol = folder.partition("://")[0] if "://" in folder else "file"
    if protocol in {"file", "local"}:
        return LocalStore(Path(folder.removeprefix("file://").removeprefix("local://")), resumes=resumes, syncs=syncs)
    try:
        return RemoteStore(folder, protocol, resumes=resumes)
    except (ImportError, ValueError) as error:
        raise UsageError(f"can't write to {folder}: {error}") from error


def is_local(url: str) -> bool:
    """Whether a path or url is on this machine's file system."""
    return "://" not in url or url.startswith(("file://", "local://"))


def identity(url: str) -> tuple[object, ...]:
    """The same for all paths and urls that lead to one file: through links, and in other spellings."""
    if "://" in url:
        url = url.rpartition("::")[2]  # a cache in front of it
    if is_local(url):
        path = Path(url.removeprefix("file://").removeprefix("local://")).resolve()
        try:
            info = path.stat()
        except OSError:
            return (str(path),)
        return info.st_dev, info.st_ino
    try:
        files, path_there = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError):
        return (url,)
    return type(files), path_there.strip("/")


class LocalStore:
    """A folder on this machine."""

    def __init__(self, folder: Path, *, resumes: bool = False, syncs: bool = True) -> None:
        self._folder = folder
        self._resumes = resumes
        self._syncs = syncs

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
        with self._named(final):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=f".{name}.", suffix=".tmp")
        try:
            with self._named(final, only=FULL), os.fdopen(descriptor, "wb") as stream:
                yield stream  # other errors in here are the caller's own: reading shards, say
                stream.flush()
            with self._named(final):
                Path(temporary).chmod(0o666 & ~_umask())
                if self._syncs:
                    sync(Path(temporary))
                Path(temporary).replace(final)
                if self._syncs:
                    sync(self._folder)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def delete(self, name: str) -> None:
        """See `Store`."""
        with self._named(self._folder / name):
            (self._folder / name).unlink(missing_ok=True)

    def adopt(self, folder: str, name: str) -> None:
        """See `Store`."""
        final = self._folder / name
        with self._named(final):
            (self._folder / folder / name).replace(final)

    def _named(self, file: Path, *, only: frozenset[int] | None = None) -> contextlib.AbstractContextManager[None]:
        return _as_output_error(str(file), only=only, resumes=self._resumes)

    def delete_if_empty(self) -> None:
        """See `Store`."""
        with contextlib.suppress(OSError):  # not empty: somebody has begun anew
            self._folder.rmdir()

    def sweep(self, is_ours: Callable[[str], bool]) -> None:
        """See `Store`."""
        try:
            left = [entry for entry in os.scandir(self._folder) if _is_temporary(entry.name)]
        except FileNotFoundError:
            return
        for entry in left:
            if is_ours(entry.name[1:].rsplit(".", 2)[0]):
                Path(entry.path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """See `Store`: an advisory lock that the kernel drops with the process, however it ends."""
        file = self._folder / name
        with self._named(file):
            descriptor = self._locked(file)
        try:
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

    def __init__(self, folder: str, protocol: str, *, resumes: bool = False) -> None:
        self._resumes = resumes
        self._url = folder.rstrip("/")
        self._fs, self._prefix = fsspec.core.url_to_fs(self._url)
        self._prefix = self._prefix.rstrip("/")
        self._uploads_are_atomic = protocol in OBJECT_STORES
        self._lease: Lease | None = None

    def path(self, name: str) -> str:
        """See `Store`."""
        return f"{self._url}/{name}"

    def names(self) -> set[str]:
        """See `Store`."""
        with _as_remote_error(self._url):
            self._fs.invalidate_cache()
            try:
                listed = self._fs.ls(self._prefix, detail=False)
            except FileNotFoundError:
                return set()
        return {name for entry in listed if not (name := entry.rsplit("/", 1)[-1]).endswith(".tmp")}

    def open(self, name: str) -> IO[bytes]:
        """See `Store`."""
        with _as_remote_error(self.path(name)):
            stream: IO[bytes] = self._fs.open(f"{self._prefix}/{name}", "rb")
            return stream

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """See `Store`: written to a local temporary file first, then uploaded in one go."""
        final = f"{self._prefix}/{name}"
        with tempfile.NamedTemporaryFile(prefix="zscore-") as stream:
            with _as_output_error(stream.name, only=FULL, resumes=self._resumes):
                yield stream
                stream.flush()
            if self._lease is not None:
                self._lease.check()
            with _as_remote_error(self.path(name)):
                if self._uploads_are_atomic:
                    self._fs.put_file(stream.name, final)
                else:
                    self._fs.makedirs(self._prefix, exist_ok=True)
                    self._fs.put_file(stream.name, f"{final}.tmp")
                    self._fs.mv(f"{final}.tmp", final)

    def delete(self, name: str) -> None:
        """See `Store`."""
        with _as_remote_error(self.path(name)), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._prefix}/{name}")

    def adopt(self, folder: str, name: str) -> None:
        """See `Store`."""
        self.delete(name)  # some file systems move nothing onto a file
        with _as_remote_error(self.path(name)):
            self._fs.mv(f"{self._prefix}/{folder}/{name}", f"{self._prefix}/{name}")

    def delete_if_empty(self) -> None:
        """See `Store`; object stores have no folders to remove."""
        with contextlib.suppress(Exception):
            self._fs.invalidate_cache()
            self._fs.rmdir(self._prefix)

    def sweep(self, is_ours: Callable[[str], bool]) -> None:
        """See `Store`; what is half-written lies on the machine that wrote it."""

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """See `Store`: a lease that is renewed while we live."""
        with _as_remote_error(self.path(name)):
            lease = Lease(self._fs, f"{self._prefix}/{name}", self.path(name))
            lease.acquire()
        self._lease = lease
        try:
            yield
        finally:
            self._lease = None
            lease.release()


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_remote_error(where: str) -> Iterator[None]:
    """Whatever a remote file system raises, as one line; its clients' errors share no base."""
    try:
        yield
    except (OutputError, FileNotFoundError):
        raise
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(f"can't use {where}: {line}: check the address, credentials and rights") from error


@contextlib.contextmanager
def _as_output_error(where: str, *, only: frozenset[int] | None = None, resumes: bool = False) -> Iterator[None]:
    """Operating-system errors (or `only` these) as one line that says what to do; ours pass through."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        fix = "check that the folder exists and that you may write there"
        if error.errno in FULL:
            fix = "free some space"
        if resumes:
            fix += "; finished shards are kept and the same command resumes"
        raise OutputError(f"can't write {where}: {error.strerror or error}: {fix}") from error
