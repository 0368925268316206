"""`zscore doctor`: what this machine has."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Show which engines work here, the GPU and the versions, and what each missing piece needs.

    Exits with 1 where scoring can't work at all.

    \b
    Example:
      zscore doctor
    """
    from rich.console import Console

    from zscore.doctor import diagnose, healthy, table

    checks = diagnose()
    Console().print(table(checks))
    if not healthy(checks):
        raise typer.Exit(1)
