"""Tables and lines for the terminal. Text from a table is data: no markup, no control characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import JustifyMethod
    from rich.table import Table
    from rich.text import Text


def plain(value: object) -> str:
    """A value as one line that can't steer the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else f"\\u{ord(c):04x}" for c in str(value))


def cell(value: object) -> Text:
    """A value for a table, without markup."""
    from rich.text import Text

    return Text(plain(value))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> Table:
    """A table whose first columns are text and the others numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=cell(title), title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for number, name in enumerate(columns):
        made.add_column(cell(name), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(cell, row))
    return made


def listing(title: str, columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[object]]) -> Table:
    """A table with one line a row: text (`True`) is cut to what the terminal has left, numbers never are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = [[plain(value) for value in row] for row in rows]
    longest = [max((len(row[n]) for row in cells), default=0) for n in range(len(columns))]
    widths = _widths([(name, is_text, longest[n]) for n, (name, is_text) in enumerate(columns)], Console().width)
    made = Table(title=cell(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for (name, is_text), width in zip(columns, widths, strict=True):
        justify: JustifyMethod = "left" if is_text else "right"
        made.add_column(cell(name), justify=justify, no_wrap=True, overflow="ellipsis", width=width)
    for row in cells:
        made.add_row(*map(cell, row))
    return made


def _widths(columns: Sequence[tuple[str, bool, int]], total: int) -> list[int]:
    """Numbers get what they need, names up to 14 (6 over numbers, where it is narrow), the longest text the rest."""
    wide, narrow = (
        [max(longest, min(len(name), 14 if is_text else most)) for name, is_text, longest in columns]
        for most in (14, 6)
    )
    if sum(wide) + 2 * len(columns) <= total:
        return wide
    texts = [n for n, (_, is_text, _) in enumerate(columns) if is_text]
    if texts:
        longest_text = max(texts, key=lambda n: narrow[n])
        widths = [min(width, 14) if n in texts and n != longest_text else width for n, width in enumerate(narrow)]
        others = sum(widths) - widths[longest_text]
        widths[longest_text] = min(widths[longest_text], max(8, total - others - 2 * len(columns)))
        return widths
    return narrow


def say(*lines: str) -> None:
    """Lines on standard output, unwrapped."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(plain(line), markup=False, highlight=False, soft_wrap=True)


def show(*renderables: object) -> None:
    """Tables on standard output."""
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(renderable)


def share(count: int, total: int) -> str:
    """A count as a percentage."""
    return f"{count / total:.1%}" if total else "–"
