"""The main job through real vLLM, and against the reference engine."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from tests.running import Watching, rows, run, shared_judge
from tests.tiny import write_shards
from zscore.parquet import read_metadata

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    with shared_judge(tmp_path_factory.mktemp("rubric"), engine="vllm", dtype="bfloat16") as shared:
        yield shared


def test_every_real_picture_is_scored(judge, shared_data, tmp_path):
    summary = run(judge, shared_data / "avt-shards", tmp_path / "s.parquet")
    assert dict(summary.counts) == {"ok": 134}
    metadata = read_metadata(str(tmp_path / "s.parquet"), "s")
    assert (metadata["engine"]["name"], metadata["engine"]["dtype"]) == ("vllm", "bfloat16")


def test_both_engines_agree_on_real_pictures_and_the_default_rubric(shared_data, tmp_path):
    for engine in ("vllm", "transformers"):
        with shared_judge(tmp_path, engine=engine, rubric="z-reward", max_pixels=65_536) as judge:
            run(judge, shared_data / "avt-shards", tmp_path / f"{engine}.parquet", limit=30)
    fast, slow = (pl.read_parquet(tmp_path / f"{engine}.parquet") for engine in ("vllm", "transformers"))
    for column in ("shard", "key", "prompt", "status", "sha256", "width", "height"):
        assert fast[column].to_list() == slow[column].to_list()
    for name in ("alignment", "realism", "aesthetics", "plausibility"):
        difference = np.abs(fast[f"{name}_probs"].to_numpy() - slow[f"{name}_probs"].to_numpy())
        assert difference.max() <= 2e-2
        assert np.abs(fast[name].to_numpy() - slow[name].to_numpy()).max() <= 0.02


def test_a_resumed_run_has_the_same_rows(judge, tmp_path):
    write_shards(tmp_path / "in", 3, 9, broken=frozenset({3}))
    run(judge, tmp_path / "in", tmp_path / "whole.parquet")

    def stop(reporter):
        if reporter.rows == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(judge, tmp_path / "in", tmp_path / "s.parquet", Watching(stop))
    judge.reload()  # a resumed run is a process of its own, with an engine of its own
    again = Watching()
    run(judge, tmp_path / "in", tmp_path / "s.parquet", again)
    assert again.rows == 18
    assert rows(tmp_path / "s.parquet") == rows(tmp_path / "whole.parquet")


def test_scores_don_t_depend_on_how_fast_pictures_come(judge, tmp_path):
    write_shards(tmp_path / "in", 1, 6)
    run(judge, tmp_path / "in", tmp_path / "a.parquet", workers=0)
    run(judge, tmp_path / "in", tmp_path / "b.parquet", workers=2)
    assert rows(tmp_path / "a.parquet") == rows(tmp_path / "b.parquet")
