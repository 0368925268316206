"""Runs the application and turns what it raises into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from zscore.cli.render import plain
from zscore.errors import InterruptedRunError, ZscoreError

if TYPE_CHECKING:
    import typer


def run(app: typer.Typer) -> int:
    """Exit code of one call; `ZSCORE_DEBUG=1` adds the traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except KeyboardInterrupt:
        sys.stderr.write("zscore: interrupted\n")
        return InterruptedRunError.exit_code
    except ZscoreError as error:
        if os.environ.get("ZSCORE_DEBUG"):
            import traceback

            traceback.print_exc()
        # Names and values out of files stand in messages; none may steer the terminal.
        sys.stderr.write(f"zscore: {plain(' '.join(str(error).split()))}\n")
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _terminate(*_: object) -> None:
    """A polite kill ends a run like Ctrl-C does: workers stopped, temporary files removed."""
    raise KeyboardInterrupt
