"""Input arguments → the list of shards: folders, globs, braces and fsspec urls, in a fixed order.

The order is that of the arguments, sorted by path inside each. What isn't called like a shard is ignored, so that
`shards/*` may hold a licence and a log; hidden files and folders are ignored too. An argument that leads to nothing
is an error, and so is one missing path of a brace pattern.
"""
# os.path says no where Path raises (a brace pattern may be longer than a file name), and paths stay strings like urls.
# ruff: noqa: PTH110, PTH112, PTH113, PTH114, PTH115, PTH116, PTH118, PTH120, PTH207, PTH208

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from zscore.braces import expand_braces
from zscore.errors import ShardNotFoundError, UsageError
from zscore.records import ShardRef
from zscore.stores import http_status, is_remote, local_version, reason, remote_version, without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_MAX_PATHS = 1_000_000
"""That one brace pattern may stand for."""
_EXTENSIONS = (".tar", ".tar.gz", ".tgz")
_ENDINGS = "shards end in .tar, .tar.gz or .tgz"
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "'zscore-reward[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "hf": "huggingface_hub",
}
"""What to install for a protocol."""
_HTTP = frozenset({"http", "https"})
_MAGIC = re.compile(r"[*?[]")
_CONNECTIONS = 16
"""Requests at once where a brace pattern stands for many urls."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A shard before it has a name."""

    url: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class _Finding:
    """What one argument stands for."""

    shards: list[_Found]
    roots: list[str]
    """The folders that it names; all names are relative to what the roots of all arguments have in common."""


def expand(inputs: Sequence[str]) -> list[ShardRef]:
    """Finds the shards that `inputs` stand for.

    Args:
        inputs: Files, folders (everything below them), globs, brace patterns, fsspec urls of all of these. Single
            http(s) urls are taken as they are, since nothing can be listed there.

    Returns:
        Each shard once, named by its path relative to the common root of the inputs.

    Raises:
        ShardNotFoundError: An argument, or a path of a brace pattern, matches no shard.
        UsageError: A pattern that stands for too much, a store that can't be listed, a protocol without its package.
    """
    shards: dict[str, _Found] = {}
    roots: list[str] = []
    for value in inputs:
        finding = _find(value)
        roots += finding.roots
        for found in finding.shards:
            shards.setdefault(found.url, found)
    if not shards:
        shown = ", ".join(map(repr, inputs[:3])) or "no inputs at all"
        raise ShardNotFoundError(f"no shard in {shown}; {_ENDINGS}")
    names = _names(list(shards), roots)
    return [ShardRef(found.url, names[url], found.size, found.version) for url, found in shards.items()]


def is_shard_name(path: str) -> bool:
    """Whether a file is called like a shard."""
    return path.lower().endswith(_EXTENSIONS)


def _not_found(value: str, missing: Sequence[str], total: int, nearby: Iterable[str]) -> ShardNotFoundError:
    """Returns the error for an argument of `total` paths, with the shards that lie beside the first missing one."""
    if _dangles(missing[0]):
        target = os.readlink(missing[0])
        return ShardNotFoundError(f"{missing[0]!r} is a link to {target!r}, which isn't there: fetch the data first")
    text = f"no shard at {missing[0]!r}"
    if total > 1:
        shown = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
        text = f"{len(missing)} of the {total} paths that {value!r} stands for lead to no shard: {shown}"
    near = get_close_matches(missing[0].rpartition("/")[2], nearby, cutoff=0.5)
    return ShardNotFoundError(f"{text}; " + (f"near it: {', '.join(map(repr, near))}" if near else _ENDINGS))


def _find(value: str) -> _Finding:
    if is_remote(value) and not value.startswith("file://"):
        return _find_remote(value)
    try:
        return _find_local(value.removeprefix("file://"))
    except OSError as error:
        raise UsageError(f"can't look for shards in {value!r}: {error.strerror} ({error.filename})") from error


def _find_local(value: str) -> _Finding:
    head = value
    while head and not os.path.exists(head):
        head = os.path.dirname(head)
    # What exists is meant as it stands, even with braces or brackets in its name.
    paths = [head + tail for tail in expand_braces(value.removeprefix(head), _MAX_PATHS)]
    finding = _Finding([], [])
    missing = []
    for path in paths:
        root, matches = _matches(path)
        found = [shard for match in matches for shard in _local_shards(match, set())]
        finding.roots.append(root)
        finding.shards.extend(found)
        # An existing file of another kind is ignored: `shards/*` gives it where the shell expands the star.
        if (not found and not os.path.isfile(path)) or _dangles(path):
            missing.append(path)
    if missing:
        raise _not_found(value, missing, len(paths), _nearby(missing[0]))
    return finding


def _matches(path: str) -> tuple[str, list[str]]:
    """Returns the folder that a path or glob names, and what is there, sorted by the parts of the path."""
    if os.path.isdir(path):
        root = os.path.realpath(path)
        return root, [root]
    folder, name = os.path.split(path)
    while glob.has_magic(folder) and not os.path.exists(folder):
        folder, parent = os.path.split(folder)
        name = f"{parent}/{name}"
    root = os.path.realpath(folder or ".")
    if os.path.exists(path) or not glob.has_magic(name):
        return root, [os.path.join(root, name)]
    found = glob.glob(name, root_dir=root, recursive=True)
    return root, [os.path.join(root, match) for match in sorted(found, key=lambda match: match.split("/"))]


def _local_shards(path: str, seen: set[tuple[int, int]]) -> Iterator[_Found]:
    """Yields a shard, or all below a folder; links may make circles, so each folder is entered once."""
    if os.path.isdir(path):
        info = os.stat(path)
        if (info.st_dev, info.st_ino) not in seen:
            seen.add((info.st_dev, info.st_ino))
            for name in sorted(name for name in os.listdir(path) if not name.startswith(".")):
                yield from _local_shards(os.path.join(path, name), seen)
    elif is_shard_name(path) and os.path.isfile(path):
        info = os.stat(path)
        yield _Found(path, info.st_size, local_version(info))
    elif is_shard_name(path) and _dangles(path):
        yield _Found(path, -1, "")  # reading it fails, and its row says so


def _dangles(path: str) -> bool:
    """Whether a link leads nowhere, as git-annex and DVC leave them for data that wasn't fetched."""
    return os.path.islink(path) and not os.path.exists(path)


def _nearby(path: str) -> list[str]:
    folder = os.path.dirname(path) or "."
    return [name for name in os.listdir(folder) if is_shard_name(name)] if os.path.isdir(folder) else []


def _find_remote(value: str) -> _Finding:
    """Finds the shards of one url, glob, or brace pattern of urls; raises what `expand` says."""
    urls = expand_braces(value, _MAX_PATHS)
    protocol = _protocol(value)
    find = _find_http if protocol in _HTTP else _find_listed
    try:
        files, _ = _store(urls[0])
        files.invalidate_cache()  # listings of an earlier call
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            findings = list(pool.map(find, urls))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = f"`pip install {package}`" if package else str(error)
        raise UsageError(f"{value!r}: the package that opens {protocol}:// isn't installed: {fix}") from error
    except UsageError:
        raise
    except Exception as error:  # stores raise from a dozen unrelated trees
        raise UsageError(f"can't look for shards in {value!r}: {reason(error)}") from error
    missing = [url for url, finding in zip(urls, findings, strict=True) if finding is None]
    if missing:
        raise _not_found(value, missing, len(urls), _nearby_remote(missing[0]))
    shards = [shard for finding in findings if finding for shard in finding.shards]
    return _Finding(shards, [root for finding in findings if finding for root in finding.roots])


def _store(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # 0.3 s of imports that local shards don't need

    files, path = url_to_fs(url)
    return files, path


def _protocol(url: str) -> str:
    return url.partition("://")[0].rpartition("::")[2]


def _find_http(url: str) -> _Finding | None:
    if "*" in url.partition("?")[0] or url.endswith("/"):
        raise UsageError(f"{url!r}: nothing can be listed over http; write the urls out, or as braces {{000..099}}.tar")
    files, path = _store(url)
    try:
        details = files.info(path)
    except FileNotFoundError as error:
        if http_status(error.__cause__ or error) in {404, 410}:
            return None
        details = {}  # reading is tried more than once, and tells in the shard's row
    return _Finding([_found(url, details)], [url.partition("?")[0].rpartition("/")[0]])


def _find_listed(url: str) -> _Finding | None:
    url = url.rstrip("/")
    files, path = _store(url)
    head = url.removesuffix(path)
    if head == url:
        head = files.unstrip_protocol(path).removesuffix(path)
    if magic := _MAGIC.search(path):
        root = path[: magic.start()].rpartition("/")[0]
        matches = files.glob(path, detail=True)
    else:
        try:
            details = files.info(path)
        except FileNotFoundError:
            return None
        if details["type"] != "directory":
            root = path.rpartition("/")[0]
            # A file of another kind is ignored, as it is among local arguments.
            shards = [_found(url, details)] if is_shard_name(path) else []
            return _Finding(shards, [head + root])
        root = path
        matches = {path: details}
    listed: dict[str, Any] = {}
    for name, details in matches.items():
        listed.update(files.find(name, detail=True) if details["type"] == "directory" else {name: details})
    shards = [_found(head + name, listed[name]) for name in _shard_paths(listed, root)]
    return _Finding(shards, [head + root]) if shards else None


def _shard_paths(paths: Iterable[str], root: str) -> list[str]:
    def is_hidden(path: str) -> bool:
        return any(part.startswith(".") for part in path.removeprefix(root).split("/"))

    chosen = (path for path in paths if is_shard_name(path) and not is_hidden(path))
    return sorted(chosen, key=lambda path: path.split("/"))


def _found(url: str, details: Mapping[str, Any]) -> _Found:
    size = details.get("size")
    return _Found(url, size if isinstance(size, int) else -1, remote_version(details))


def _nearby_remote(url: str) -> list[str]:
    files, path = _store(url)
    if _protocol(url) in _HTTP or not files.isdir(folder := path.rpartition("/")[0]):
        return []
    return [name.rpartition("/")[2] for name in files.ls(folder, detail=False) if is_shard_name(name)]


def _names(urls: Sequence[str], roots: Sequence[str]) -> dict[str, str]:
    """Names every shard by its path relative to the common root, without secrets, as valid UTF-8, each unique."""
    columns = zip(*(without_secrets(path).rstrip("/").split("/") for path in roots), strict=False)
    depth = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    names = {}
    for url in urls:
        parts = without_secrets(url).split("/")
        name = "/".join(parts[depth:]).lstrip("/" if depth else "") or parts[-1]
        names[url] = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    uses = Counter(names.values())
    for url, name in names.items():
        if uses[name] > 1:
            names[url] = f"{name}#{sha256(os.fsencode(url)).hexdigest()[:8]}"
    return names
