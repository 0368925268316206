"""Where scores come from, in words: the footer of a table as label and value."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Of a hash; enough to compare by eye.
DIGITS = 16


def facts_of(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and values in the order in which people ask; what the footer doesn't say is left out.

    Entries that differ between files stand as `mixed_NAME` lists.
    """
    rubric, model, engine = (_mapping(metadata, name) for name in ("rubric", "model", "engine"))
    levels = [str(level.get("value")) for level in rubric.get("levels") or []]
    found = {
        "Model": _named(model, "id", "weights"),
        "Trained": model.get("trained"),
        "Rubric": _named(rubric, "name", "hash"),
        "Dimensions": ", ".join(rubric.get("dimensions") or []),
        "Levels": f"{len(levels)}, from {levels[0]} to {levels[-1]}" if levels else None,
        "Layout": metadata.get("layout"),
        "Engine": " ".join(str(engine[key]) for key in ("name", "version", "dtype") if engine.get(key)),
        "Image budget": f"{metadata['max_pixels']:,} pixels" if isinstance(metadata.get("max_pixels"), int) else None,
        "Prompt template": str(metadata.get("template") or "")[:DIGITS],
        "Shards": f"{metadata['shards']:,}" if isinstance(metadata.get("shards"), int) else None,
        "Scored": _time(metadata.get("created"), metadata.get("finished")),
        "By": f"zscore {metadata['version']}" if metadata.get("version") else None,
    }
    mixed = {
        f"{name.removeprefix('mixed_').capitalize()} (mixed)": f"{len(values)} different ones"
        for name, values in metadata.items()
        if name.startswith("mixed_") and isinstance(values, list)
    }
    steps = {f"Step {number}": _step(step) for number, step in enumerate(metadata.get("derived") or [], 1)}
    return [(label, str(value)) for label, value in {**found, **mixed, **steps}.items() if value]


def _mapping(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = metadata.get(name)
    return found if isinstance(found, dict) else {}


def _named(entry: Mapping[str, Any], name: str, digest: str) -> str:
    shown = str(entry.get(digest) or "")[:DIGITS]
    return " ".join(part for part in (str(entry.get(name) or ""), f"({shown})" if shown else "") if part)


def _time(start: Any, end: Any) -> str | None:
    """When it ended and how long it took; the texts as they are where they aren't times."""
    if not (start and end):
        return str(end or start) if end or start else None
    try:
        first, last = datetime.fromisoformat(str(start)), datetime.fromisoformat(str(end))
        took = timedelta(seconds=round((last - first).total_seconds()))
    except (TypeError, ValueError):
        return f"{start} to {end}"
    return f"{last:%Y-%m-%d %H:%M %Z}, after {took} h".replace(" days", " d").replace(" day", " d")


def _step(step: Any) -> str:
    if not isinstance(step, dict):
        return str(step)
    criteria = step.get("criteria")
    shown = ", ".join(f"{name} {value}" for name, value in criteria.items()) if isinstance(criteria, dict) else ""
    return f"zscore {step.get('command')}" + (f": {shown}" if shown else "")
