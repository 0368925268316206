"""Input and output on a real S3 protocol server."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from tests.running import Watching, rows, run, shared_judge
from tests.s3server import BUCKET, s3_server
from tests.tiny import write_shards
from zscore.errors import OutputLockedError


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    with shared_judge(tmp_path_factory.mktemp("rubric")) as shared:
        yield shared


def test_shards_and_scores_on_s3_with_an_interruption(judge, tmp_path, monkeypatch):
    paths = write_shards(tmp_path / "in", 3, 3, broken=frozenset({4}))
    run(judge, tmp_path / "in", tmp_path / "local.parquet")
    with s3_server(monkeypatch) as files:
        for path in paths:
            files.put_file(str(path), f"{BUCKET}/in/{path.name}")
        source, out = f"s3://{BUCKET}/in", f"s3://{BUCKET}/out/scores.parquet"

        def disturb(reporter):
            if reporter.rows == 1:
                with pytest.raises(OutputLockedError, match="is writing to s3://"):
                    run(judge, source, out)
            if reporter.rows == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(judge, source, out, Watching(disturb))
        assert not files.exists(f"{BUCKET}/out/scores.parquet")
        again = Watching()
        run(judge, source, out, again)
        assert again.rows == 6
        with files.open(f"{BUCKET}/out/scores.parquet") as stream:
            assert pq.read_table(stream).to_pylist() == rows(tmp_path / "local.parquet")
        assert files.find(f"{BUCKET}/out") == [f"{BUCKET}/out/scores.parquet"]
        assert run(judge, source, out).already_done
        retried = Watching()
        run(judge, source, out, retried, retry_failed=True)
        assert retried.rows == 1
