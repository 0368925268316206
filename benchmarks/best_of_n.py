"""`zscore select` against polars' `sort_by().first()` per group.

All read one table of 20 columns, find the best candidate of each group (failed rows take no part; of equal scores the
first row wins), and write the winners with all columns in the order of the input. There are two polars queries: the
one that its users write first, `group_by().agg(all().sort_by().first())`, and one by hand that finds the winners from
the deciding columns and then takes their rows in a second pass, as zscore does. Each runs in a process of its own, in
turn, after a round that warms up.

    python benchmarks/best_of_n.py [--rows 20000000] [--candidates 8] [--rounds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import polars as pl
from _children import ratios, summary, timed
from _common import report
from _scores import write_scores

SIDES = ("zscore", "polars", "polars_two_passes")
ROWS_PER_GROUP = 65_536


def candidates(source: str) -> pl.LazyFrame:
    """Rows that take part, numbered."""
    numbered = pl.scan_parquet(source, row_index_name="row")
    return numbered.filter(pl.col("status") == "ok", pl.col("overall").is_finite(), pl.col("group").is_not_null())


def write(rows: pl.LazyFrame, out: str) -> None:
    """As zscore writes."""
    rows.sink_parquet(out, compression="zstd", compression_level=1, row_group_size=ROWS_PER_GROUP, engine="streaming")


def run_polars(source: str, out: str) -> None:
    """The query as one would write it first."""
    best = pl.all().sort_by("overall", descending=True, maintain_order=True).first()
    write(candidates(source).group_by("group").agg(best).sort("row").drop("row"), out)


def run_polars_two_passes(source: str, out: str) -> None:
    """The query as one would write it after that one took too long."""
    best = pl.col("row").sort_by("overall", descending=True, maintain_order=True).first()
    winners = candidates(source).group_by("group").agg(best).select("row").collect()
    numbered = pl.scan_parquet(source, row_index_name="row")
    write(numbered.join(winners.lazy(), on="row", how="semi", maintain_order="left").drop("row"), out)


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
    rows = [pl.scan_parquet(out).select("key", "group", "overall", "sha256").collect() for out in outs.values()]
    if not all(found.equals(rows[0]) for found in rows[1:]):
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
        {"polars": run_polars, "polars_two_passes": run_polars_two_passes}[options.side](options.source, options.out)
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
                **{f"{side}_over_zscore": ratios(runs[side], runs["zscore"]) for side in SIDES[1:]},
            }
    wanted = "polars_over_zscore >= 3, zscore's peak memory <= 4000 MB, identical rows"
    report("best_of_n", {**result, "wanted": wanted})


if __name__ == "__main__":
    main()
