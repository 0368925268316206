"""Human ratings: one long table whatever the file looked like, and its aggregation over raters.

A rating is (sample, dimension, rater) → score. The paper drops the highest and the lowest score of a sample before it
builds the ground truth (section 2); `aggregate` does that to the mean and to the raters' histogram alike.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from zscore.errors import TableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Aggregation = Literal["trimmed", "mean"]
AGGREGATIONS: tuple[Aggregation, ...] = ("trimmed", "mean")
ROLES = ("shard", "index", "key", "group", "dimension", "rater", "score")
SAMPLE_ROLES = ("shard", "index", "key", "group")
OVERALL = "overall"
# Means that differ only by the order of a sum must tie.
DECIMALS = 9


@dataclass(frozen=True, slots=True)
class Ratings:
    """Ratings in long form."""

    frame: pl.DataFrame
    """Columns key, dimension, rater (text) and score (float64); shard, index and group where the file has them."""
    relative: bool
    """Scores are ranks or votes: they only compare samples of one group."""
    source: str
    """Where they come from, for messages."""
    scale: tuple[float, float] | None = None
    """Least and largest rating that raters could give, where the format says so."""

    @property
    def sample(self) -> list[str]:
        """The columns that name a sample."""
        return [role for role in SAMPLE_ROLES if role in self.frame.columns]


def read_columns(source: str, wanted: Sequence[str] = ()) -> pl.DataFrame:
    """A CSV, TSV or parquet file, local or by fsspec url; the columns of a CSV are all text, so that 0042 stays 0042.

    Args:
        source: path or url; the suffix says what it is.
        wanted: of a parquet file, read only these where it has them.

    Raises:
        TableError: no such file, or it can't be read.
    """
    suffix = source.rsplit(".", 1)[-1].lower()
    with _named(source):
        data = _bytes_of(source)
        if suffix == "parquet":
            there = [name for name in pl.read_parquet_schema(data) if name in wanted]
            return pl.read_parquet(data, columns=there or None)
        return pl.read_csv(data, infer_schema=False, separator="\t" if suffix == "tsv" else ",")


def read_text(source: str) -> str:
    """A text file, local or by fsspec url.

    Raises:
        TableError: no such file, or not UTF-8.
    """
    with _named(source):
        data = _bytes_of(source)
        return (data if isinstance(data, bytes) else data.read_bytes()).decode("utf-8-sig")


def _bytes_of(source: str) -> Path | bytes:
    if "://" not in source:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(source)
        return path
    import fsspec

    with fsspec.open(source, "rb") as stream:
        data: bytes = stream.read()
    return data


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Turns what readers raise into one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise TableError(f"{source}: no such file") from error
    except (pl.exceptions.PolarsError, OSError, ValueError, ImportError) as error:
        raise TableError(f"{source} can't be read: {str(error).splitlines()[0]}") from error


def read_table(source: str, columns: Mapping[str, str], dimensions: Sequence[str]) -> Ratings:
    """Ratings of a table: long (a `score` column, one rating a row) or wide (a column per dimension).

    Args:
        source: CSV, TSV or parquet.
        columns: role → the file's name for it, where it differs; roles are `ROLES`.
        dimensions: names that a wide table's value columns may have.

    Raises:
        TableError: a column is missing, or a score isn't a finite number.
        UsageError: an unknown role.
    """
    frame = _with_roles(read_columns(source), columns, source)
    if not {"key", "index"} & set(frame.columns):
        raise TableError(
            f"{source} has no column 'key' (or 'index'), only {', '.join(frame.columns)}: "
            "say which one names the sample with --column key=NAME"
        )
    frame = frame if "score" in frame.columns else _melted(frame, dimensions, source)
    if "dimension" not in frame.columns:
        frame = frame.with_columns(dimension=pl.lit(OVERALL))
    return Ratings(cleaned(frame, source), relative=False, source=source)


def _with_roles(frame: pl.DataFrame, columns: Mapping[str, str], source: str) -> pl.DataFrame:
    for role, name in columns.items():
        if role not in ROLES:
            raise UsageError(f"--column {role}={name}: the role is one of {', '.join(ROLES)}")
        if name not in frame.columns:
            near = get_close_matches(name, frame.columns, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(frame.columns)}"
            raise TableError(f"{source} has no column '{name}' (--column {role}={name}): {hint}")
    # A column that already bears the role's name gives way to the one that was named for it.
    frame = frame.drop([role for role, name in columns.items() if role != name and role in frame.columns])
    return frame.rename({name: role for role, name in columns.items()})


def _melted(frame: pl.DataFrame, dimensions: Sequence[str], source: str) -> pl.DataFrame:
    values = [name for name in frame.columns if name in dimensions and name not in ROLES]
    if not values:
        raise TableError(
            f"{source} has neither a 'score' column (long) nor one named after a dimension (wide): it has "
            f"{', '.join(frame.columns)}, the dimensions are {', '.join(dimensions)}; "
            "use --column score=NAME or --map NAME=DIMENSION"
        )
    keep = [role for role in (*SAMPLE_ROLES, "rater") if role in frame.columns]
    lists = [name for name in values if isinstance(frame.schema[name], (pl.List, pl.Array))]
    if not lists:
        return frame.unpivot(values, index=keep, variable_name="dimension", value_name="score")
    # A list holds one rating per rater; lists of different dimensions may differ in length.
    tables = []
    for name in values:
        one = frame.select(*keep, pl.lit(name).alias("dimension"), pl.col(name).alias("score"))
        if name in lists:
            numbered = one.with_columns(rater=pl.int_ranges(pl.col("score").list.len()))
            one = numbered.explode("score", "rater")
        tables.append(one)
    return pl.concat(tables, how="diagonal_relaxed")


def cleaned(frame: pl.DataFrame, source: str) -> pl.DataFrame:
    """The columns of `Ratings` in their types; rows without a score (not rated) are left out.

    Raises:
        TableError: a score that isn't a finite number, a sample without a name, or a rating that stands there twice.
    """
    text = [name for name in ("shard", "key", "group", "dimension", "rater") if name in frame.columns]
    kept = [role for role in ROLES if role in frame.columns]
    raw = frame.select(kept).with_columns(pl.col(text).cast(pl.String))
    if raw.schema["score"] == pl.String:
        raw = raw.with_columns(pl.col("score").str.strip_chars().replace("", None))
    raw = raw.filter(pl.col("score").is_not_null())
    score = pl.col("score").cast(pl.Float64, strict=False)
    _refuse(raw.filter(~score.is_finite().fill_null(value=False)), "score", "isn't a finite number", source)
    table = raw.with_columns(score)
    if "index" in table.columns:
        position = pl.col("index").cast(pl.Int64, strict=False)
        _refuse(table.filter(position.is_null()), "index", "isn't a whole number", source)
        table = table.with_columns(position)
    for name in ("key", "shard"):
        if name in table.columns:
            _refuse(table.filter(pl.col(name).is_null()), name, "is empty", source)
    if "rater" not in table.columns:
        table = table.with_columns(rater=pl.lit(None, pl.String))
    _refuse_twice(table, source)
    return table


def _refuse(rows: pl.DataFrame, column: str, problem: str, source: str) -> None:
    if rows.height:
        raise TableError(f"{source}: {rows.height:,} rows whose {column} {problem}; the first: {_shown(rows)}")


def _refuse_twice(table: pl.DataFrame, source: str) -> None:
    rating = [name for name in table.columns if name != "score"]
    twice = table.group_by(rating, maintain_order=True).len().filter(pl.col("len") > 1)
    if twice.height:
        fix = (
            "remove the duplicates"
            if twice["rater"][0] is not None
            else "name the column that tells raters apart with --column rater=NAME"
        )
        raise TableError(
            f"{source}: {twice.height:,} ratings stand there more than once; the first: {_shown(twice)}: {fix}"
        )


def _shown(rows: pl.DataFrame) -> str:
    first: dict[str, Any] = rows.row(0, named=True)
    return ", ".join(f"{name} {value!r}" for name, value in first.items() if value is not None and name != "len")


def aggregation(name: str) -> Aggregation:
    """The rule of that name.

    Raises:
        UsageError: there is none.
    """
    for rule in AGGREGATIONS:
        if rule == name:
            return rule
    raise UsageError(f"--aggregate '{name}' is none of {', '.join(AGGREGATIONS)}")


def aggregate(ratings: Ratings, how: Aggregation) -> pl.DataFrame:
    """One row per sample and dimension, sorted: its aggregated score, the ratings behind it, and how many there were.

    Args:
        ratings: of any number of raters.
        how: `trimmed` drops one highest and one lowest rating where there are three or more (paper, section 2);
            `mean` keeps all.

    Returns:
        The sample's columns, dimension, score (float64, rounded to 1e-9), ratings (list, those that were kept) and
        raters (those that rated).
    """
    by = [*ratings.sample, "dimension"]
    grouped = ratings.frame.group_by(by).agg(ratings=pl.col("score").sort(), raters=pl.len()).sort(by)
    if how == "trimmed":
        inner = pl.col("ratings").list.slice(1, (pl.col("raters").cast(pl.Int64) - 2).clip(lower_bound=0))
        grouped = grouped.with_columns(ratings=pl.when(pl.col("raters") > 2).then(inner).otherwise(pl.col("ratings")))
    return grouped.with_columns(score=pl.col("ratings").list.mean().round(DECIMALS))


def rename_dimensions(ratings: Ratings, names: Mapping[str, str]) -> Ratings:
    """The ratings with some dimensions under other names.

    Raises:
        UsageError: a name that no rating has, or two dimensions that would fall together.
    """
    present = ratings.frame["dimension"].unique().sort().to_list()
    for name in names:
        if name not in present:
            raise UsageError(f"--map {name}={names[name]}: {ratings.source} rates {', '.join(present)}")
    renamed = [names.get(name, name) for name in present]
    if len(set(renamed)) != len(renamed):
        raise UsageError(f"--map gives two dimensions of {ratings.source} one name: {', '.join(renamed)}")
    frame = ratings.frame.with_columns(pl.col("dimension").replace(dict(names)))
    return replace(ratings, frame=frame)
