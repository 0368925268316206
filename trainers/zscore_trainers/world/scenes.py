"""What a picture of the rubric world shows, what is wrong with it, and what it is therefore worth.

A prompt names one to three shapes on a 3x3 grid by size, colour, form and place. A candidate shows them with faults
drawn for each dimension by itself; the true score of a dimension is 5 less the severity of its fault, in half-points:

    alignment     an object is missing (2), of another form or colour (1.5), elsewhere (1), of another size (0.5)
    realism       texture noise, or blur
    aesthetics    a garish ground, or stripes across it
    plausibility  shapes float above their shadows, or a bar runs through them
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

DIMENSIONS = ("alignment", "realism", "aesthetics", "plausibility")
FORMS = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
PLACES = tuple(
    " ".join(word for word in (row, column) if word) or "centre"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
MOST_OBJECTS = 3
BEST, WORST = 5.0, 1.0
MISSING, WRONG_FORM, WRONG_COLOUR, WRONG_PLACE, WRONG_SIZE = 2.0, 1.5, 1.5, 1.0, 0.5
FAULTLESS_SHARE = 0.35
"""How often a dimension has no fault at all."""

Spoiler = Literal["noise", "blur"]
Clash = Literal["garish", "stripes"]
Impossibility = Literal["floating", "pierced"]
KINDS: dict[str, tuple[str, str]] = {
    "realism": get_args(Spoiler),
    "aesthetics": get_args(Clash),
    "plausibility": get_args(Impossibility),
}
"""Of faults, for each dimension but alignment."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape."""

    form: str
    colour: str
    size: str
    place: int
    """Number of its cell, row by row."""

    @property
    def words(self) -> str:
        """What and where it is."""
        return f"{self.size} {self.colour} {self.form} at the {PLACES[self.place]}"

    def __str__(self) -> str:
        """As a prompt says it."""
        return f"a {self.words}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture to be drawn. Severities are 0 … 4, in half-points."""

    asked: tuple[Thing, ...]
    shown: tuple[Thing | None, ...]
    """One for each that was asked for; None is missing."""
    realism: tuple[Spoiler, float] = ("noise", 0.0)
    aesthetics: tuple[Clash, float] = ("garish", 0.0)
    plausibility: tuple[Impossibility, float] = ("floating", 0.0)
    seed: int = 0
    """Of the noise's grain and the ground's hue, which no score depends on."""

    @property
    def prompt(self) -> str:
        """What was asked for."""
        return " and ".join(map(str, self.asked))

    @property
    def truth(self) -> dict[str, float]:
        """The true score of each dimension."""
        lost = sum(_penalty(*pair) for pair in zip(self.asked, self.shown, strict=True))
        severities = (lost, self.realism[1], self.aesthetics[1], self.plausibility[1])
        return {name: max(WORST, BEST - lost) for name, lost in zip(DIMENSIONS, severities, strict=True)}


def _penalty(asked: Thing, shown: Thing | None) -> float:
    if shown is None:
        return MISSING
    return (
        WRONG_FORM * (shown.form != asked.form)
        + WRONG_COLOUR * (shown.colour != asked.colour)
        + WRONG_PLACE * (shown.place != asked.place)
        + WRONG_SIZE * (shown.size != asked.size)
    )


def draw_prompt(rng: random.Random) -> tuple[Thing, ...]:
    """Things to ask for, each in a cell of its own, row by row."""
    cells = sorted(rng.sample(range(9), rng.randint(1, MOST_OBJECTS)))
    return tuple(Thing(rng.choice(FORMS), rng.choice(COLOURS), rng.choice(SIZES), cell) for cell in cells)


def draw_scene(asked: tuple[Thing, ...], rng: random.Random) -> Scene:
    """One candidate for a prompt."""
    return Scene(
        asked,
        _shown(asked, rng),
        realism=(rng.choice(("noise", "blur")), _severity(rng)),
        aesthetics=(rng.choice(("garish", "stripes")), _severity(rng)),
        plausibility=(rng.choice(("floating", "pierced")), _severity(rng)),
        seed=rng.getrandbits(31),
    )


def _severity(rng: random.Random) -> float:
    return 0.0 if rng.random() < FAULTLESS_SHARE else rng.randint(1, 8) / 2


def _shown(asked: tuple[Thing, ...], rng: random.Random) -> tuple[Thing | None, ...]:
    shown: list[Thing | None] = list(asked)
    if rng.random() < FAULTLESS_SHARE:
        return asked
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(shown))
        shown[at] = _spoiled(shown[at], {thing.place for thing in (*asked, *shown) if thing}, rng)
    if all(thing is None for thing in shown):  # an empty picture would tell nothing about the other dimensions
        shown[0] = asked[0]
    return tuple(shown)


def _spoiled(thing: Thing | None, taken: set[int], rng: random.Random) -> Thing | None:
    if thing is None:
        return None
    fault = rng.choice(("missing", "form", "colour", "place", "size"))
    if fault == "missing":
        return None
    if fault == "form":
        return replace(thing, form=_other(FORMS, thing.form, rng))
    if fault == "colour":
        return replace(thing, colour=_other(COLOURS, thing.colour, rng))
    if fault == "size":
        return replace(thing, size=_other(SIZES, thing.size, rng))
    return replace(thing, place=rng.choice(sorted(set(range(9)) - taken)))


def _other(values: tuple[str, ...], value: str, rng: random.Random) -> str:
    return rng.choice([one for one in values if one != value])


def caption(scene: Scene) -> str:
    """What is seen, row by row, whatever was asked for."""
    seen = sorted((thing for thing in scene.shown if thing), key=lambda thing: thing.place)
    return f"I see {' and '.join(map(str, seen))}."


def reasoning(scene: Scene, dimension: str) -> str:
    """A judge's words on one dimension: what is seen, then what is wrong with it.

    On alignment, each thing that was asked for is said again beside what became of it: a small model compares what
    stands next to each other.
    """
    if dimension == "alignment":
        return f"{caption(scene)} {_comparison(scene.asked, scene.shown)}"
    kind, severity = getattr(scene, dimension)
    if not severity:
        return {"realism": "It is clean.", "aesthetics": "The ground is calm.", "plausibility": "All stand."}[dimension]
    words = {
        "noise": "grain on it",
        "blur": "blur on it",
        "garish": "a garish ground",
        "stripes": "stripes on the ground",
        "floating": "shapes floating",
        "pierced": "a bar through shapes",
    }
    return f"I see {words[kind]}, {_how_much(severity)}."


def unrelated(scene: Scene, asked: tuple[Thing, ...]) -> str:
    """What is seen, and how it compares with what was asked for of another picture, cell by cell."""
    there = {thing.place: thing for thing in scene.shown if thing}
    return f"{caption(scene)} {_comparison(asked, [there.get(thing.place) for thing in asked])}"


def _comparison(asked: Sequence[Thing], shown: Sequence[Thing | None]) -> str:
    return " ".join(_compared(*pair) for pair in zip(asked, shown, strict=True))


def _compared(asked: Thing, shown: Thing | None) -> str:
    """One thing that was asked for, and in what the one that is seen differs."""
    if shown is None:
        return f"The {asked.words} is missing."
    differs = [
        text
        for text, same in (
            (shown.size, shown.size == asked.size),
            (shown.colour, shown.colour == asked.colour),
            (shown.form, shown.form == asked.form),
            (f"at the {PLACES[shown.place]}", shown.place == asked.place),
        )
        if not same
    ]
    return f"The {asked.words} is {', '.join(differs) or 'there'}."


def _how_much(severity: float) -> str:
    return ("slight", "some", "much", "extreme")[min(int(severity), 3)]
