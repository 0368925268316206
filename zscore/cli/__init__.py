"""The command line: parse, call, render. No logic, and no heavy import before a command runs.

Each command is one file of this package and a line in `COMMANDS`.
"""

from __future__ import annotations

import sys

from zscore.cli.app import build_app


def main() -> None:
    """Entry point of the `zscore` script: errors become one line and an exit code."""
    from zscore.cli.run import run

    sys.exit(run(build_app()))
