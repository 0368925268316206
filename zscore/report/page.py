"""Fills the template: one HTML file that needs no network and runs no script but its own.

Texts from a table are escaped by the template engine wherever they stand, and none of them reaches a script as code:
data comes as JSON in an element that isn't executed. Should one slip through, the page's Content-Security-Policy
allows only the scripts and styles whose hashes it lists, and no request to anywhere.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from base64 import b64encode
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from zscore.report.cards import MOST_NAME, MOST_PROMPT, shorten
from zscore.report.provenance import facts_of
from zscore.report.summary import WIDTH_BINS
from zscore.report.tables import threshold_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2 import Template

    from zscore.report.cards import Card
    from zscore.report.columns import Columns
    from zscore.report.picks import Group, GroupStats
    from zscore.report.summary import Grid, StatusCount

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "charts.js", "report.js")
STYLE = "report.css"
# Of what the table says of itself, which may be anything; the page is to be mailed.
MOST_FACTS, MOST_FOOTER = 200, 200_000
LICENCES = {"D3": "vendor/d3.LICENSE", "Observable Plot": "vendor/plot.LICENSE"}
# Observable Plot gives every drawing this style element, which the policy has to know; `charts.js` sets the class.
PLOT_STYLE = """:where(.plot) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.plot text),
:where(.plot tspan) {
  white-space: pre;
}"""


@dataclass(frozen=True, slots=True)
class PageGallery:
    """Cards under one heading."""

    title: str
    note: str
    cards: list[Card]


@dataclass(frozen=True, slots=True)
class PageGroup:
    """Candidates side by side."""

    group: Group
    cards: list[Card]


@dataclass(slots=True, kw_only=True)
class Page:
    """Everything that the page says; what has a default is missing where there are no scores."""

    title: str
    sources: Sequence[str]
    """How the command line names the table."""
    mixed: bool
    """Whether the filter command has to allow that its files differ."""
    metadata: dict[str, Any]
    columns: Columns
    levels: Sequence[float]
    statuses: list[StatusCount]
    rows: int
    scored: int = 0
    unscored: int = 0
    """Rows that claim to be ok and have no number."""
    distinct: int | None = None
    """Different pictures."""
    grid: Grid | None = None
    described: list[dict[str, Any]] = field(default_factory=list)
    thresholds: dict[str, Any] = field(default_factory=dict)
    correlation: dict[str, Any] | None = None
    uncertainty: list[dict[str, Any]] = field(default_factory=list)
    groups: GroupStats | None = None
    galleries: list[PageGallery] = field(default_factory=list)
    chosen: list[PageGroup] = field(default_factory=list)
    pictures: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The filter command that a threshold is appended to."""
        return shlex.join(["zscore", "filter", *self.sources, *(["--allow-mixed"] if self.mixed else [])])

    @property
    def data(self) -> dict[str, Any]:
        """What the scripts draw from."""
        statuses = [[line.status, line.count] for line in self.statuses]
        if self.grid is None:
            return {"statuses": statuses}
        return {
            "statuses": statuses,
            "scores": self.columns.scores,
            "rows": self.scored,
            "stops": self.grid.stops,
            "decimals": self.grid.decimals,
            "levels": self.levels,
            **self.thresholds,
            "groups": self.groups.groups if self.groups else 0,
            "covered": self.groups.covered if self.groups else [],
            "correlation": self.correlation,
            "uncertainty": [{"name": line["name"], "cells": line["cells"]} for line in self.uncertainty],
            "std_bins": WIDTH_BINS,
            "command": self.command,
        }


@cache
def _asset(name: str) -> str:
    text = (files("zscore.report") / "assets" / name).read_text(encoding="utf-8")
    # A browser turns CR LF into LF before it hashes, and an end tag would end the element early.
    assert "\r" not in text, f"{name} has carriage returns"
    assert not any(end in text.lower() for end in ("</script", "</style", "<!--")), f"{name} can't be inlined"
    return text


def policy() -> str:
    """The Content-Security-Policy: our scripts and styles by their hashes, inlined pictures, nothing else."""
    scripts = " ".join(_hash(_asset(name)) for name in SCRIPTS)
    styles = " ".join(map(_hash, (_asset(STYLE), PLOT_STYLE)))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _template() -> Template:
    """Compiled once: a page with pictures is rendered twice, and compiling takes three times as long as that."""
    environment = Environment(
        loader=PackageLoader("zscore.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "share": _share, "count": _count}
    return environment.get_template("page.html.jinja")


def render(page: Page) -> str:
    """The page as HTML."""
    return _template().render(
        page=page,
        policy=policy(),
        # Ours, and checked by `_asset`; the template escapes everything else.
        style=_asset(STYLE),
        scripts=[_asset(name) for name in SCRIPTS],
        licences={name: _asset(file) for name, file in LICENCES.items()},
        facts=_facts(page.metadata),
        footer=shorten(json.dumps(_short(page.metadata), indent=2, ensure_ascii=False, sort_keys=True), MOST_FOOTER),
        table_lines=threshold_table(page.thresholds, page.grid, page.levels, page.scored) if page.grid else [],
    )


def _facts(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    facts = facts_of(metadata)[:MOST_FACTS]
    return [(shorten(label, MOST_NAME), shorten(text, MOST_PROMPT)) for label, text in facts]


def _short(metadata: dict[str, Any]) -> dict[str, Any]:
    """The footer without what is long and said elsewhere."""
    rubric = {key: value for key, value in metadata.get("rubric", {}).items() if key != "source"}
    inputs = metadata.get("inputs")
    rest = {key: value for key, value in metadata.items() if key not in {"rubric", "inputs", "part"}}
    return {**rest, "rubric": rubric, **({"inputs": f"{len(inputs)} shards"} if isinstance(inputs, list) else {})}


def _score(value: float | None, decimals: int = 2) -> str:
    if value is None:
        return "–"
    # Adding 0 makes a zero of a minus zero.
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def _share(count: float, total: float) -> str:
    return f"{count / total:.1%}" if total else "–"


def _count(value: int) -> str:
    return f"{value:,}"
