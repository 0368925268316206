"""What `zscore --help` costs beyond starting Python: CPU seconds (user + system), median of interleaved runs.

python benchmarks/startup.py [--runs 15]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

from _common import report  # type: ignore[import-not-found]

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import typer'": [sys.executable, "-c", "import typer"],
    "zscore --help": [sys.executable, "-m", "zscore", "--help"],
    "zscore score --help": [sys.executable, "-m", "zscore", "score", "--help"],
    "zscore filter --help": [sys.executable, "-m", "zscore", "filter", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(options.runs + 1):
        for name, command in COMMANDS.items():
            seconds = cpu_seconds(command)
            if run:  # the first one warms the file cache
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["python -c pass"]
    beyond = {name: round(median - base, 3) for name, median in medians.items()}
    report(
        "startup",
        {
            "cpu_s": {name: round(median, 3) for name, median in medians.items()},
            "beyond_python_s": beyond,
            "wanted": "zscore --help <= 0.3 s beyond python -c pass",
        },
    )


if __name__ == "__main__":
    main()
