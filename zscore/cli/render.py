"""Tables and lines for the terminal. Text from a table is data: no markup, no control characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import JustifyMethod
    from rich.table import Table
    from rich.text import Text


# Of a text before numbers, so much isn't folded.
LABEL = 16


def plain(value: object) -> str:
    """A value as one line that can't steer the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else f"\\u{ord(c):04x}" for c in str(value))


def cell(value: object) -> Text:
    """A value for a table, without markup."""
    from rich.text import Text

    return Text(plain(value))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> Table:
    """A table whose first columns are text, folded where there is no room, and the others numbers, which never are.

    Where even so it doesn't fit, it gets closer and then wider than the terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = [[plain(value) for value in row] for row in rows]
    longest = [max(len(name), *(len(row[n]) for row in cells), 0) for n, name in enumerate(columns)]
    least = sum(min(width, LABEL) if n < left else width for n, width in enumerate(longest)) + len(columns) + 1
    room = Console().width
    made = Table(title=cell(title), title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    made.padding = (0, 1 if least + 2 * len(columns) <= room else 0)
    made.width = least if least > room else None
    for n, name in enumerate(columns):
        is_text = n < left
        made.add_column(cell(name), justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in cells:
        made.add_row(*map(cell, row))
    return made


def listing(title: str, columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[object]]) -> Table:
    """A table with one line a row: text (`True`) is cut to what the terminal has left, numbers never are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = [[plain(value) for value in row] for row in rows]
    longest = [max((len(row[n]) for row in cells), default=0) for n in range(len(columns))]
    room = Console().width
    widths = _widths([(name, is_text, longest[n]) for n, (name, is_text) in enumerate(columns)], room)
    made = Table(title=cell(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    least = sum(widths) + 2 * len(widths)
    made.width = least if least > room else None  # else rich would cut numbers
    for (name, is_text), width in zip(columns, widths, strict=True):
        justify: JustifyMethod = "left" if is_text else "right"
        made.add_column(cell(name), justify=justify, no_wrap=True, overflow="ellipsis", width=width)
    for row in cells:
        made.add_row(*map(cell, row))
    return made


def _widths(columns: Sequence[tuple[str, bool, int]], total: int) -> list[int]:
    """Numbers get what they need, names up to 14 (6 or 4 over numbers, where it is narrow), the longest text the rest.

    The other texts get up to 14, or 10 or 6 where that is too much still.
    """
    gaps = 2 * len(columns)
    widths = [max(longest, min(len(name), 14)) for name, _, longest in columns]
    texts = [n for n, (_, is_text, _) in enumerate(columns) if is_text]
    longest_text = max(texts, key=lambda n: widths[n], default=None)
    for most_name, most_text in ((6, 14), (4, 14), (4, 10), (4, 6)):
        if sum(widths) + gaps <= total:
            break
        for n, (name, is_text, longest) in enumerate(columns):
            widths[n] = min(widths[n], most_text) if is_text else max(longest, min(len(name), most_name))
        if longest_text is not None:
            others = sum(widths) - widths[longest_text]
            wanted = max(columns[longest_text][2], min(len(columns[longest_text][0]), 14))
            widths[longest_text] = min(wanted, max(min(8, most_text), total - others - gaps))
    return widths


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
        console.print(renderable, crop=False)


def share(count: int, total: int) -> str:
    """A count as a percentage."""
    return f"{count / total:.1%}" if total else "–"
