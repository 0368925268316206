"""What the files of one table say about how they were scored: compared, and merged into one."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from zscore.errors import TableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What makes scores comparable: (where in the metadata, what people call it, what to show of it).
_IDENTITY: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("rubric", "hash"), "rubric", ("rubric", "name")),
    (("model", "weights"), "model", ("model", "id")),
    (("layout",), "layout", ("layout",)),
    (("template",), "template", ("template",)),
    (("max_pixels",), "max_pixels", ("max_pixels",)),
)


def _is_level(entry: Any) -> bool:
    value = entry.get("value") if isinstance(entry, dict) else None
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of(is_entry: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, list) and all(map(is_entry, found))


def _is_counts(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(count, int) for count in found.values())


def _is_part(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("shard"), dict) and "name" in found["shard"]


# What is relied upon: (where, what it must be in words, how that is told). Entries without a dot may be missing.
_SHAPE: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("rubric.dimensions", "a list of names", _is_list_of(lambda entry: isinstance(entry, str))),
    ("rubric.levels", "a list of levels with a value each", _is_list_of(_is_level)),
    ("derived", "a list of objects", _is_list_of(lambda entry: isinstance(entry, dict))),
    ("counts", "numbers by status", _is_counts),
    ("shards", "a number", lambda found: isinstance(found, int)),
    ("created", "a text", lambda found: isinstance(found, str)),
    ("finished", "a text", lambda found: isinstance(found, str)),
    ("part", "an object that names its shard", _is_part),
)


def check_shape(file: str, metadata: dict[str, Any]) -> None:
    """Refuse metadata that no command of zscore writes, before something fails on it.

    Raises:
        TableError: names the entry.
    """
    if not isinstance(metadata.get("rubric"), dict):
        raise TableError(f"{file} has no rubric in its metadata: it isn't a scores table")
    for where, wanted, is_right in _SHAPE:
        path = where.split(".")
        is_there = path[0] in metadata
        if is_there and not is_right(_at(metadata, path)):
            raise TableError(f"{file}: its metadata's {where} isn't {wanted}: it isn't a scores table")


def are_alike(metadatas: Sequence[dict[str, Any]]) -> bool:
    """Whether the files were scored alike and made by the same commands."""
    first = metadatas[0]
    return not any(difference(first, other) or _commands(first) != _commands(other) for other in metadatas[1:])


def check_unmixed(files: Sequence[str], metadatas: Sequence[dict[str, Any]], *, allow_mixed: bool | None) -> None:
    """Refuse files that were scored differently; None for `allow_mixed` does so without advising the option.

    Raises:
        TableError: names the field, both values and both files; or a table among those it was derived from.
    """
    first = metadatas[0]
    otherwise = ", or pass --allow-mixed" if allow_mixed is not None else ""
    for file, metadata in zip(files[1:], metadatas[1:], strict=True):
        if allow_mixed:
            continue
        name = difference(first, metadata)
        if name:
            ours, theirs = (shown(data, name) for data in (first, metadata))
            raise TableError(
                f"{files[0]} and {file} weren't scored alike: {name} {ours} and {theirs};"
                f" name files that were{otherwise}"
            )
        if _commands(first) != _commands(metadata):
            raise TableError(
                f"{files[0]} and {file} don't belong together: {_origin(file, metadata)}, {_origin(files[0], first)};"
                f" name the files that are meant{otherwise}"
            )


def identity(metadata: dict[str, Any]) -> dict[str, Any]:
    """What of the metadata makes scores comparable, under the same keys."""
    kept: dict[str, Any] = {key: metadata.get(key) for key in ("model", "layout", "template", "max_pixels")}
    return {"rubric": {key: _at(metadata, ("rubric", key)) for key in ("name", "hash")}, **kept}


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What people call the first thing that makes two scores incomparable; empty where there is none."""
    return next((name for path, name, _ in _IDENTITY if _at(ours, path) != _at(theirs, path)), "")


def shown(metadata: dict[str, Any], name: str) -> str:
    """The metadata's value of what `difference` named."""
    return next(_shown(metadata, path, label) for path, called, label in _IDENTITY if called == name)


def _at(metadata: dict[str, Any], path: Sequence[str]) -> Any:
    found: Any = metadata
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _shown(metadata: dict[str, Any], path: Sequence[str], shown: Sequence[str]) -> str:
    name, value = _at(metadata, shown), str(_at(metadata, path))
    return f"'{str(name)[:12]}'" if shown == path else f"'{name}', {path[-1]} {value[:12]}"


def _commands(metadata: dict[str, Any]) -> list[str]:
    return [str(step.get("command")) for step in metadata.get("derived", [])]


def _origin(file: str, metadata: dict[str, Any]) -> str:
    commands = _commands(metadata)
    return f"{file} was made by zscore {' and then '.join(commands or ['score'])}"


def merged(metadatas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One entry for all files: what they share, counts and shards summed, first start and last end.

    Where rubrics differ, only the dimensions that all have are left, and the levels only if they are the same.
    """
    if len(metadatas) == 1:
        return metadatas[0]
    result = {
        key: value
        for key, value in metadatas[0].items()
        if key not in {"part", "inputs"} and all(other.get(key) == value for other in metadatas)
    }
    counts: dict[str, int] = {}
    for metadata in metadatas:
        for status, count in metadata.get("counts", {}).items():
            counts[status] = counts.get(status, 0) + count
    result |= {"counts": counts, "shards": sum(int(metadata.get("shards", 0)) for metadata in metadatas)}
    for key, pick in (("created", min), ("finished", max)):
        times = [metadata[key] for metadata in metadatas if key in metadata]
        if times:
            result[key] = pick(times)
    if "rubric" not in result:
        result["rubric"] = _common_rubric([metadata["rubric"] for metadata in metadatas])
    for key in ("model", "layout", "template", "max_pixels", "derived", "engine", "options"):
        if key not in result and any(key in metadata for metadata in metadatas):
            result[f"mixed_{key}"] = _distinct([metadata.get(key) for metadata in metadatas])
    return result


def _common_rubric(rubrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = rubrics[0]
    names = [name for name in first["dimensions"] if all(name in rubric["dimensions"] for rubric in rubrics)]
    levels = first["levels"] if all(rubric["levels"] == first["levels"] for rubric in rubrics) else []
    mixed = _distinct([{"name": rubric.get("name"), "hash": rubric.get("hash")} for rubric in rubrics])
    return {"name": "mixed", "hash": None, "source": None, "dimensions": names, "levels": levels, "mixed": mixed}


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())
