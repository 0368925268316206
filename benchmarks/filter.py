"""`zscore filter` against the same query in bare polars and in DuckDB.

Each reads one table of 20 columns and writes the rows that it keeps with all columns: zstd level 1, row groups of
65,536 rows, order of the input. Each runs in a process of its own, in turn, after one read of the file that warms the
page cache. `zscore filter` also counts what it drops by reason and writes its metadata; the peers don't.

    python benchmarks/filter.py [--rows 20000000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from _children import ratios, summary, timed
from _common import report
from _scores import write_scores

SIDES = ("zscore", "polars", "duckdb")
QUERIES = {
    "kept_by_two_bounds": {"overall": 4.0, "realism": 3.5},
    "kept_by_one_low_bound": {"overall": 3.5},
}
ROWS_PER_GROUP = 65_536


def run_polars(source: str, out: str, bounds: dict[str, float]) -> None:
    """The query as one would write it by hand."""
    import polars as pl

    wanted = [pl.col("status") == "ok", *(pl.col(name) >= pl.lit(bound, pl.Float32) for name, bound in bounds.items())]
    kept = pl.scan_parquet(source).filter(*wanted)
    kept.sink_parquet(out, compression="zstd", compression_level=1, row_group_size=ROWS_PER_GROUP, engine="streaming")


def run_duckdb(source: str, out: str, bounds: dict[str, float]) -> None:
    """The query as one would write it by hand."""
    import duckdb

    wanted = " AND ".join(["status = 'ok'", *(f"{name} >= {bound}::FLOAT" for name, bound in bounds.items())])
    query = f"SELECT * FROM read_parquet('{source}') WHERE {wanted}"  # noqa: S608  # our own names
    options = f"FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE {ROWS_PER_GROUP}"
    duckdb.sql(f"COPY ({query}) TO '{out}' ({options})")


def command(side: str, source: Path, out: Path, bounds: dict[str, float]) -> list[str]:
    """Arguments of python."""
    if side == "zscore":
        least = [word for name, bound in bounds.items() for word in ("--min", f"{name}={bound}")]
        return ["-m", "zscore", "filter", str(source), *least, "--out", str(out), "--quiet"]
    return [__file__, "--side", side, "--source", str(source), "--out", str(out), "--bounds", json.dumps(bounds)]


def same_rows(outs: dict[str, Path]) -> int:
    """How many rows are kept.

    Raises:
        SystemExit: the sides disagree.
    """
    import polars as pl

    names = {side: pl.scan_parquet(out).select("shard", "index").collect() for side, out in outs.items()}
    first = names["zscore"].with_columns(pl.col("shard").cast(pl.String))
    for side, found in names.items():
        if not found.with_columns(pl.col("shard").cast(pl.String)).equals(first):
            raise SystemExit(f"{side} keeps other rows, or in another order")
    return len(first)


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("--side", "--source", "--out", "--bounds"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run = {"polars": run_polars, "duckdb": run_duckdb}[options.side]
        run(options.source, options.out, json.loads(options.bounds))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "scores.parquet"
        write_scores(source, options.rows, options.rows // 8, scattered=False)
        result = {"rows": options.rows, "columns": 20, "file_mb": round(source.stat().st_size / 1e6)}
        for query, bounds in QUERIES.items():
            outs = {side: folder / f"{side}.parquet" for side in SIDES}
            runs = {side: [] for side in SIDES}
            for number in range(options.rounds + 1):  # the first one warms up
                for side in SIDES if number % 2 else SIDES[::-1]:
                    outs[side].unlink(missing_ok=True)
                    took = timed(command(side, source, outs[side], bounds))
                    if number:
                        runs[side].append(took)
                    print(f"{query} {side} {took.seconds:.1f} s", file=sys.stderr, flush=True)
            result[query] = {
                "bounds": bounds,
                "kept": same_rows(outs),
                **{side: summary(found) for side, found in runs.items()},
                "over_polars": ratios(runs["zscore"], runs["polars"]),
                "over_duckdb": ratios(runs["zscore"], runs["duckdb"]),
            }
    wanted = "over_polars <= 1.2, over_duckdb < 1, zscore's peak memory <= 2000 MB"
    report("filter", {**result, "wanted": wanted})


if __name__ == "__main__":
    main()
