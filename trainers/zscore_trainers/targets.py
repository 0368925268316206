"""What samples are trained towards: a teacher's distributions, or people's labels, by shard and number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
import torch

from zscore.errors import TableError
from zscore.tables import is_ok, open_scores
from zscore_trainers.losses import label_targets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from zscore.records import Sample
    from zscore.rubrics.rubric import Rubric


class Targets(dict[tuple[str, int], "NDArray[np.float32]"]):
    """(shard, index) → distributions, (D, K); NaN where a dimension has no label.

    Args:
        found: all of them.
        left_out: what the table lacks: how many samples, by what is wrong with them.
        said: key and prompt of samples, where the table has them.
        source: the table.
    """

    def __init__(
        self,
        found: Iterable[tuple[tuple[str, int], NDArray[np.float32]]],
        left_out: dict[str, int],
        said: Mapping[tuple[str, int], tuple[str | None, str | None]] | None = None,
        source: str = "the table",
    ) -> None:
        super().__init__(found)
        self.left_out = {reason: count for reason, count in left_out.items() if count}
        self._said = said or {}
        self._source = source

    def __contains__(self, sample: object) -> bool:
        """Whether there is a target for a sample, or for a (shard, index)."""
        key = sample if isinstance(sample, tuple) else (sample.shard, sample.index)  # type: ignore[attr-defined]
        return super().__contains__(key)

    def target(self, sample: Sample) -> NDArray[np.float32]:
        """Of a sample."""
        return self[sample.shard, sample.index]

    def check(self, samples: Iterable[Sample]) -> None:
        """Refuse shards that the table wasn't made from, though they have the same names.

        Raises:
            TableError: names the first sample that has another key or prompt there.
        """
        for sample in samples:
            said = self._said.get((sample.shard, sample.index), (None, None))
            for name, there, here in zip(("key", "prompt"), said, (sample.key, sample.prompt), strict=True):
                if sample.failure is None and there is not None and there != here:
                    raise TableError(
                        f"{self._source}: sample {sample.index} of {sample.shard} has the {name} '{_cut(there)}', in"
                        f" the shards '{_cut(here)}': give the shards that the table was made from"
                    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


SHOWN = 200
"""Characters of a prompt in a message."""
SAID = ("key", "prompt")
"""What a table says of a sample besides its place."""

Kind = Literal["labels", "scores", "either"]
"""Labels of people, distributions of a model, or whichever it is."""


def nearest(scores_N: NDArray[np.float64], values: Sequence[float]) -> NDArray[np.int64]:
    """Number of the level nearest to each score; of two, the higher."""
    falling_K = np.asarray(values, dtype=np.float64)[::-1]
    apart_NK = np.abs(scores_N[:, None] - falling_K).round(9)
    return np.asarray(len(falling_K) - 1 - apart_NK.argmin(1))


def read_targets(source: str, rubric: Rubric, split: str = "train", *, kind: Kind = "either") -> Targets:
    """Targets of a table: `annotations.parquet` (labels, only those of `split`), or a teacher's scores (all ok rows).

    A sample with a label on some dimensions has targets on those; one without any is left out.

    Raises:
        TableError: neither, or not of the wanted kind; another rubric's scores; labels beyond the scale; nothing in it.
    """
    found = _annotations(source)
    if kind != "scores" and found is None and _is_pairs(source):
        raise TableError(f"{source} holds pairs; the pictures' own labels are wanted: annotations.parquet beside it")
    if kind == "scores" and found is not None:
        raise TableError(f"{source} holds people's labels; a teacher's distributions are wanted: train sft on it")
    if kind == "labels" and found is None:
        if source.lower().endswith((".csv", ".json", ".jsonl")):
            raise TableError(f"{source} is no parquet table: make annotations.parquet with `zscore annotations build`")
        open_scores(source)  # says what is wrong with it, if it isn't even that
        raise TableError(f"{source} holds a model's scores; people's labels (annotations.parquet) are wanted")
    targets = _from_scores(source, rubric) if found is None else _from_labels(found, rubric, split, source)
    if not targets:
        why = ", ".join(f"{count} {reason}" for reason, count in targets.left_out.items())
        where = "" if found is None else f" in its {split} split"
        raise TableError(f"{source} has no sample to train on{where}{f': {why}' if why else ''}")
    return targets


def test_prompts(source: str) -> set[str]:
    """Prompts of a table of annotations that are kept for evaluation.

    Raises:
        TableError: it isn't one, or keeps none.
    """
    found = _annotations(source)
    if found is None:
        raise TableError(f"{source} isn't a table of annotations (annotations.parquet), whose test prompts are wanted")
    prompts = set(found.filter(pl.col("split") == "test")["prompt"])
    if not prompts:
        raise TableError(f"{source} has no test prompts to leave out: build it with a --test-share above 0")
    return prompts


def _is_pairs(source: str) -> bool:
    try:
        return {"winner", "loser", "gap"} <= set(pl.read_parquet_schema(source))
    except (OSError, pl.exceptions.PolarsError):
        return False


def _annotations(source: str) -> pl.DataFrame | None:
    """The table, where it is one of annotations."""
    try:
        schema = pl.read_parquet_schema(source)
    except (OSError, pl.exceptions.PolarsError):
        return None  # open_scores says what is wrong with it
    if not {"shard", "index", "prompt", "split"} <= set(schema):
        return None
    return pl.read_parquet(source).with_columns(pl.col("shard", "prompt", "split").cast(pl.String))


def _from_labels(frame: pl.DataFrame, rubric: Rubric, split: str, source: str) -> Targets:
    missing = [name for name in rubric.names if name not in frame.columns]
    if missing:
        raise TableError(f"{source} has no labels of '{missing[0]}', which rubric '{rubric.name}' has")
    rows = frame.filter(pl.col("split") == split)
    try:
        labels_ND = rows.select(pl.col(rubric.names).cast(pl.Float64)).to_numpy()
        rows = rows.with_columns(pl.col("shard").cast(pl.String), pl.col("index").cast(pl.Int64))
    except pl.exceptions.PolarsError as error:
        raise TableError(
            f"{source} has labels or an index that are no numbers: {str(error).splitlines()[0]}"
        ) from error
    if rows.select(pl.any_horizontal(pl.col("shard", "index").is_null()).any()).item():
        raise TableError(f"{source} has rows without shard or index: nobody can tell whose labels they are")
    if rows.select(pl.struct("shard", "index").is_duplicated().any()).item():
        raise TableError(f"{source} has samples (shard, index) more than once: give it one row each")
    known_ND = ~np.isnan(labels_ND)
    values_K = torch.tensor(rubric.values, dtype=torch.float64)
    try:
        targets_NDK = label_targets(torch.from_numpy(np.where(known_ND, labels_ND, rubric.values[0])), values_K).numpy()
    except ValueError as error:
        raise TableError(f"{source}: {error}: the labels are on another scale than rubric '{rubric.name}'") from error
    targets_NDK[~known_ND] = np.nan
    some_N = known_ND.any(1)
    lacking_D = (~known_ND[some_N]).sum(0).tolist()
    left_out = {"have no label on any dimension": int((~some_N).sum())} | {
        f"have no label on {name}, only on others": count for name, count in zip(rubric.names, lacking_D, strict=True)
    }
    used = rows.filter(pl.Series(some_N))
    return Targets(_keyed(used, targets_NDK[some_N]), left_out, _said(used), source)


def _from_scores(source: str, rubric: Rubric) -> Targets:
    scores = open_scores(source)
    if scores.values != rubric.values or scores.dimensions != rubric.names:
        raise TableError(
            f"{source} was scored with rubric '{scores.metadata['rubric']['name']}', whose dimensions or levels aren't"
            f" those of '{rubric.name}'"
        )
    columns = [f"{name}_probs" for name in rubric.names]
    scores.require("shard", "index", *columns)
    own = [name for name in SAID if name in scores.frame.collect_schema()]
    frame = scores.frame.filter(is_ok()).select("shard", "index", *own, *columns).collect()
    failed = scores.frame.filter(~is_ok()).group_by("status").len().sort("len", descending=True).collect()
    left_out = {f"have no scores ({status})": count for status, count in failed.iter_rows()}
    if not frame.height:
        return Targets((), left_out)
    probs_NDK = np.stack([np.array(frame[name].to_list(), dtype=np.float64) for name in columns], 1)
    if not np.isfinite(probs_NDK).all():
        raise TableError(f"{source} has distributions that aren't finite: score those rows again")
    return Targets(_keyed(frame, probs_NDK / probs_NDK.sum(-1, keepdims=True)), left_out, _said(frame), source)


def _places(frame: pl.DataFrame) -> list[tuple[str, int]]:
    return list(zip(frame["shard"].cast(pl.String).to_list(), map(int, frame["index"].to_list()), strict=True))


def _said(frame: pl.DataFrame) -> dict[tuple[str, int], tuple[str | None, str | None]]:
    """Key and prompt of every row, as far as there are such columns."""
    nothing = [None] * frame.height
    both = (frame[name].cast(pl.String).to_list() if name in frame.columns else nothing for name in SAID)
    return dict(zip(_places(frame), zip(*both, strict=True), strict=True))


def _keyed(
    frame: pl.DataFrame, targets_NDK: NDArray[np.float64]
) -> Iterator[tuple[tuple[str, int], NDArray[np.float32]]]:
    for place, one in zip(_places(frame), targets_NDK, strict=True):
        yield place, one.astype(np.float32)
