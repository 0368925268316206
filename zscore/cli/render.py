"""Tables and lines for the terminal. Text from a table is data: no markup, no control characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    """A table with one line a row: text (`True`) is cut where the terminal ends, numbers never are."""
    from rich import box
    from rich.table import Table

    made = Table(title=cell(title), title_justify="left", box=box.SIMPLE_HEAD)
    for name, is_text in columns:
        made.add_column(cell(name), justify="left" if is_text else "right", no_wrap=is_text, overflow="ellipsis")
        if not is_text:
            made.columns[-1].min_width = 5
    for row in rows:
        made.add_row(*map(cell, row))
    return made


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
