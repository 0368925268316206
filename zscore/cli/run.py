"""Runs the application and turns what it raises into one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from zscore.errors import ZscoreError

if TYPE_CHECKING:
    import typer


def run(app: typer.Typer) -> int:
    """Exit code of one call; `ZSCORE_DEBUG=1` adds the traceback."""
    try:
        app()
    except ZscoreError as error:
        if os.environ.get("ZSCORE_DEBUG"):
            import traceback

            traceback.print_exc()
        sys.stderr.write(f"zscore: {' '.join(str(error).split())}\n")
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
