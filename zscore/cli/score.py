"""`zscore score`: shards in, scores.parquet out."""

from __future__ import annotations


def score() -> None:
    """Score webdataset shards."""
