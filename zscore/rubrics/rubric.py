"""A rubric: the dimensions that are judged, the levels they are judged on, and the words that ask for it.

Read from TOML: a name of a shipped rubric (`z-reward`, `q-align`) or a path. No torch, no tokenizer: whether a level
is a single token is checked where a tokenizer is at hand (`zscore.templates`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from zscore.errors import RubricError

Layout = Literal["joint", "separate", "reasoning"]
"""How scores are asked for: all in one prompt, a prompt each, or a prompt each and words before the score."""
LAYOUTS: tuple[Layout, ...] = ("joint", "separate", "reasoning")
MAX_LEVELS = 64
# These would collide with other columns of scores.parquet.
RESERVED = frozenset(
    {
        *("shard", "index", "key", "prompt", "group", "status", "error", "width", "height", "sha256"),
        *("overall", "reasoning", "output_tokens"),
    }
)


@dataclass(frozen=True, slots=True)
class Level:
    """One rung of the scale."""

    token: str
    """Text that must be a single token of the model's tokenizer."""
    value: float
    """Rubric value, e.g. 3.5."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that is judged."""

    name: str
    """Column prefix in scores.parquet."""
    title: str
    """How the prompt names it."""
    question: str
    anchors: tuple[tuple[str, str], ...]
    """(value, meaning) pairs, best first."""


@dataclass(frozen=True, slots=True)
class Rubric:
    """A parsed rubric; `hash` identifies its meaning, whatever the file's comments and spacing."""

    name: str
    dimensions: tuple[Dimension, ...]
    levels: tuple[Level, ...]
    prompt_text: str
    """Introduces the user's prompt; holds `{prompt}` exactly once."""
    scale_text: str
    question_text: str
    anchor_text: str
    separate_probe: str
    joint_probe: str
    joint_between: str
    reasoning_ask: str
    """Ends the question where the model is to reason; empty where the rubric has no such layout."""
    reasoning_marker: str
    """What the model writes between its reasoning and the score."""
    source: str
    """The TOML text, kept in the metadata of every scores file."""
    hash: str

    @property
    def values(self) -> tuple[float, ...]:
        """Level values in token order, shape (K,)."""
        return tuple(level.value for level in self.levels)

    @property
    def names(self) -> tuple[str, ...]:
        """Dimension names in column order, shape (D,)."""
        return tuple(dimension.name for dimension in self.dimensions)

    def question(self, dimension: Dimension) -> str:
        """The question of one dimension with what its levels mean."""
        anchors = "".join(
            self.anchor_text.replace("{value}", value).replace("{meaning}", meaning)
            for value, meaning in dimension.anchors
        )
        text = self.question_text.replace("{title}", dimension.title).replace("{question}", dimension.question)
        return text.replace("{anchors}", anchors)

    def ask(self, dimension: Dimension) -> str:
        """What ends the question of one dimension where the model is to reason."""
        return self.reasoning_ask.replace("{title}", dimension.title)


def shipped() -> list[str]:
    """Names of the rubrics that come with zscore."""
    return sorted(entry.name[:-5] for entry in files("zscore.rubrics").iterdir() if entry.name.endswith(".toml"))


def load_rubric(name_or_path: str) -> Rubric:
    """Read a shipped rubric by name, or a TOML file by path.

    Raises:
        RubricError: unknown name, unreadable file, or a field that is missing or wrong (named, with the fix).
    """
    if name_or_path in shipped():
        return parse_rubric((files("zscore.rubrics") / f"{name_or_path}.toml").read_text(encoding="utf-8"))
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        near = get_close_matches(name_or_path, shipped(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"shipped are {', '.join(shipped())}; or give a .toml file"
        raise RubricError(f"no rubric is called '{name_or_path}': {hint}")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RubricError(f"can't read the rubric {name_or_path}: {error}") from error
    return parse_rubric(source, where=name_or_path)


def parse_rubric(source: str, where: str = "rubric") -> Rubric:
    """Parse and check a rubric's TOML text.

    Raises:
        RubricError: naming the field, the value and what is wanted.
    """
    try:
        data = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise RubricError(f"{where}: not valid TOML: {error}") from error
    try:
        rubric = _build(data, source)
    except KeyError as error:
        raise RubricError(f"{where}: the field {error} is missing; compare with the shipped z-reward.toml") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise RubricError(f"{where}: {error}") from error
    _check(rubric, data, where)
    return rubric


def _build(data: dict[str, Any], source: str) -> Rubric:
    dimensions = tuple(
        Dimension(
            name=str(entry["name"]),
            title=str(entry["title"]),
            question=str(entry["question"]),
            anchors=tuple((str(value), str(meaning)) for value, meaning in entry["anchors"].items()),
        )
        for entry in data["dimensions"]
    )
    canonical = json.dumps(data, sort_keys=True, ensure_ascii=True)
    return Rubric(
        name=str(data["name"]),
        dimensions=dimensions,
        levels=tuple(Level(str(entry["token"]), float(entry["value"])) for entry in data["levels"]),
        prompt_text=data["text"]["prompt"],
        scale_text=data["text"]["scale"],
        question_text=data["text"]["question"],
        anchor_text=data["text"]["anchor"],
        separate_probe=data["layouts"]["separate"]["probe"],
        joint_probe=data["layouts"]["joint"]["probe"],
        joint_between=data["layouts"]["joint"]["between"],
        reasoning_ask=str(data["layouts"].get("reasoning", {}).get("ask", "")),
        reasoning_marker=str(data["layouts"].get("reasoning", {}).get("marker", "")),
        source=source,
        hash=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def _check(rubric: Rubric, data: dict[str, Any], where: str) -> None:
    """The rules that make a rubric scoreable."""
    tokens = [level.token for level in rubric.levels]
    values = list(rubric.values)
    problems = {
        f"{len(tokens)} levels; 2 to {MAX_LEVELS} are wanted": not 2 <= len(tokens) <= MAX_LEVELS,
        f"two levels share a token: {tokens}": len(set(tokens)) != len(tokens),
        f"a level's token is empty: {tokens}": "" in tokens,
        f"level values must be finite and ascend: {values}": not all(map(math.isfinite, values))
        or any(low >= high for low, high in itertools.pairwise(values)),
        "no dimensions": not rubric.dimensions,
        f"two dimensions share a name: {rubric.names}": len(set(rubric.names)) != len(rubric.names),
        f"text.prompt holds '{{prompt}}' {rubric.prompt_text.count('{prompt}')} times; once is wanted": (
            rubric.prompt_text.count("{prompt}") != 1
        ),
        f"overall = {data.get('overall')!r}; only 'mean' is known": data.get("overall", "mean") != "mean",
        "a probe text is empty": not (rubric.separate_probe and rubric.joint_probe),
        "layouts.reasoning wants both an ask and a marker": bool(rubric.reasoning_ask.strip())
        != bool(rubric.reasoning_marker.strip()),
    }
    for name in rubric.names:
        problems[f"the dimension name {name!r} isn't a lower-case identifier, or is a column of its own"] = (
            not name.isidentifier() or name != name.lower() or name in RESERVED
        )
        for suffix in ("std", "entropy", "probs"):
            problems[f"the dimension name '{name}_{suffix}' is a column of dimension '{name}'"] = (
                f"{name}_{suffix}" in rubric.names
            )
    for problem, found in problems.items():
        if found:
            raise RubricError(f"{where}: {problem}")
