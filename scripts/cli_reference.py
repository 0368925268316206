"""Writes docs/cli.md: the help of every command, as the commands print it. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from typer.main import get_command

from zscore.cli.app import build_app

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 100

HEAD = """# Command line

Written by `make docs` from the commands' own `--help`; don't edit it by hand.
"""


def render() -> str:
    """The whole page."""
    group = get_command(build_app())
    root = group.make_context("zscore", [], resilient_parsing=True, terminal_width=WIDTH)
    parts = [HEAD, block("zscore", root.get_help())]
    for name, command in getattr(group, "commands", {}).items():
        context = command.make_context(name, [], parent=root, resilient_parsing=True, terminal_width=WIDTH)
        parts.append(block(f"zscore {name}", context.get_help()))
        for inner, part in getattr(command, "commands", {}).items():
            below = part.make_context(inner, [], parent=context, resilient_parsing=True, terminal_width=WIDTH)
            parts.append(block(f"zscore {name} {inner}", below.get_help()))
    return "\n".join(parts)


def block(title: str, text: str) -> str:
    """One command's section."""
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return f"## {title}\n\n```text\n{lines}\n```\n"


def main() -> int:
    """Write the page, or say that it is out of date."""
    page = render()
    if "--check" in sys.argv[1:]:
        return int(not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != page)
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
