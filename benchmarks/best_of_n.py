"""`zscore select` against polars' `sort_by().first()` per group.

Both read one table of 20 columns, find the best candidate of each group (failed rows take no part; of equal scores the
first row wins), and write the winners with all columns in the order of the input. The polars query finds the winners
from the deciding columns alone, then takes their rows: carrying all columns through the group-by takes it longer, and
more memory than there is. Each runs in a process of its own, in turn, after a round that warms up.

    python benchmarks/best_of_n.py [--rows 20000000] [--candidates 8] [--rounds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from _children import ratios, summary, timed
from _common import report
from _scores import write_scores

SIDES = ("zscore", "polars")
ROWS_PER_GROUP = 65_536


def run_polars(source: str, out: str) -> None:
    """The query as one would write it by hand."""
    import polars as pl

    numbered = pl.scan_parquet(source, row_index_name="row")
    candidates = numbered.filter(pl.col("status") == "ok", pl.col("overall").is_finite(), pl.col("group").is_not_null())
    best = pl.col("row").sort_by("overall", descending=True, maintain_order=True).first()
    winners = candidates.group_by("group").agg(best).select("row").collect()
    rows = numbered.join(winners.lazy(), on="row", how="semi", maintain_order="left").drop("row")
    rows.sink_parquet(out, compression="zstd", compression_level=1, row_group_size=ROWS_PER_GROUP, engine="streaming")


def command(side: str, source: Path, out: Path) -> list[str]:
    """Arguments of python."""
    if side == "zscore":
        return ["-m", "zscore", "select", str(source), "--best", "1", "--out", str(out), "--quiet"]
    return [__file__, "--side", side, "--source", str(source), "--out", str(out)]


def same_rows(outs: dict[str, Path]) -> int:
    """How many rows are selected.

    Raises:
        SystemExit: the sides disagree.
    """
    import polars as pl

    rows = [pl.scan_parquet(out).select("key", "group", "overall", "sha256").collect() for out in outs.values()]
    if not rows[0].equals(rows[1]):
        raise SystemExit("the sides select other rows, or in another order")
    return len(rows[0])


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--candidates", type=int, default=8, help="of a group")
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("--side", "--source", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_polars(options.source, options.out)
        return
    groups = options.rows // options.candidates
    result = {"rows": options.rows, "columns": 20, "groups": groups}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layout in ("together", "scattered"):
            source = folder / "scores.parquet"
            write_scores(source, options.rows, groups, scattered=layout == "scattered")
            outs = {side: folder / f"{side}.parquet" for side in SIDES}
            runs = {side: [] for side in SIDES}
            for number in range(options.rounds + 1):
                for side in SIDES if number % 2 else SIDES[::-1]:
                    outs[side].unlink(missing_ok=True)
                    took = timed(command(side, source, outs[side]))
                    if number:
                        runs[side].append(took)
                    print(f"{layout} {side} {took.seconds:.1f} s", file=sys.stderr, flush=True)
            result[f"groups_{layout}"] = {
                "selected": same_rows(outs),
                **{side: summary(found) for side, found in runs.items()},
                "polars_over_zscore": ratios(runs["polars"], runs["zscore"]),
            }
    wanted = "polars_over_zscore >= 3, zscore's peak memory <= 4000 MB, identical rows"
    report("best_of_n", {**result, "wanted": wanted})


if __name__ == "__main__":
    main()
