"""Nothing is lost, mixed up or left lying about, whatever ends a run and whatever a folder holds."""

from __future__ import annotations

import tarfile

import fsspec
import pytest

from tests.command import zscore
from tests.scores_factory import row, write_scores
from tests.test_reshard import all_rows, kept_rows, make_tar, raw_members, read_back, run, samples
from zscore import reshard as module
from zscore.errors import OutputError, OutputMismatchError, TableError, UsageError
from zscore.tables import open_scores

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def job(tmp_path):
    source = make_tar(tmp_path / "src" / "a.tar", samples(6))
    return kept_rows(tmp_path, all_rows(source, "a.tar")), tmp_path / "src"


def files(folder):
    """All of them, also hidden ones."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(folder):
    return sorted(path.name for path in folder.iterdir())


class TestSources:
    """What is still to be read is never replaced."""

    def test_through_a_link(self, tmp_path, job):
        run(*job, tmp_path / "best")
        (tmp_path / "combo").mkdir()
        (tmp_path / "combo" / "x.tar").symlink_to(tmp_path / "best" / "kept-000000.tar")
        kept = kept_rows(tmp_path, all_rows(tmp_path / "combo" / "x.tar", "x.tar")[:2], "two.parquet")
        before = files(tmp_path / "best")
        with pytest.raises(UsageError, match="would delete the source shard kept-000000.tar"):
            run(kept, tmp_path / "combo", tmp_path / "best", overwrite=True)
        assert files(tmp_path / "best") == before

    @pytest.mark.parametrize("scheme", ["local://", "file://"])
    def test_by_another_scheme(self, tmp_path, job, scheme):
        run(*job, tmp_path / "best")
        kept = kept_rows(tmp_path, [("kept-000000.tar", 0, "s0000")], "one.parquet")
        with pytest.raises(UsageError, match="would delete the source shard"):
            run(kept, f"{scheme}{tmp_path}/best", tmp_path / "best", overwrite=True)

    def test_by_another_spelling_of_a_url(self, tmp_path):
        memory = fsspec.filesystem("memory")
        source = make_tar(tmp_path / "a.tar", samples(3))
        memory.pipe_file(f"{tmp_path}/src/kept-000000.tar", source.read_bytes())
        kept = kept_rows(tmp_path, [("kept-000000.tar", 0, "s0000")])
        with pytest.raises(UsageError, match="would delete the source shard"):
            run(kept, f"memory://{tmp_path}/src", f"memory:/{tmp_path}/src", overwrite=True)
        assert memory.cat(f"{tmp_path}/src/kept-000000.tar") == source.read_bytes()


class TestOverwrite:
    def test_the_old_output_stays_until_the_new_one_is_complete(self, tmp_path, job):
        run(*job, tmp_path / "out", shard_size="2")
        before = files(tmp_path / "out")
        bad = kept_rows(tmp_path, [("a.tar", 0, "s0000"), ("a.tar", 9, "x")], "bad.parquet")
        with pytest.raises(TableError, match="sample 9"):
            run(bad, job[1], tmp_path / "out", overwrite=True, shard_size="1")
        assert files(tmp_path / "out") == before
        assert everything(tmp_path / "out") == sorted(str(name) for name in before)

    @pytest.mark.parametrize("remote", [False, True])
    def test_it_is_what_a_fresh_run_makes(self, tmp_path, job, remote):
        out = f"memory:/{tmp_path}/out" if remote else str(tmp_path / "out")
        run(*job, out, shard_size="1")
        few = kept_rows(tmp_path, [("a.tar", 2, "s0002"), ("a.tar", 4, "s0004")], "few.parquet")
        assert run(few, job[1], out, shard_size="1", overwrite=True).resumed == 0
        run(few, job[1], tmp_path / "fresh", shard_size="1")
        if remote:
            fsspec.filesystem("memory").get(f"{tmp_path}/out/", f"{tmp_path}/out/", recursive=True)
        assert files(tmp_path / "out") == files(tmp_path / "fresh")
        assert run(few, job[1], out, shard_size="1").resumed == 2

    def test_killed_while_shards_change_places(self, tmp_path, job, monkeypatch):
        run(*job, tmp_path / "out", shard_size="2")
        with monkeypatch.context() as patch:
            patch.setattr(module._Job, "_write_index", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(*job, tmp_path / "out", shard_size="3", overwrite=True)
        with pytest.raises(OutputMismatchError, match="--overwrite"):
            run(*job, tmp_path / "out", shard_size="3")
        assert len(run(*job, tmp_path / "out", shard_size="3", overwrite=True).shards) == 2
        assert everything(tmp_path / "out") == ["kept-000000.tar", "kept-000001.tar", "kept-index.json"]

    def test_an_error_promises_no_resume(self, tmp_path, job, monkeypatch):
        run(*job, tmp_path / "out")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("zscore.shard_writer.write_all", full)
        with pytest.raises(OutputError) as caught:
            run(*job, tmp_path / "out", overwrite=True)
        assert "resumes" not in str(caught.value)

    def test_a_folder_in_the_place_of_a_shard(self, tmp_path, job):
        (tmp_path / "out" / "kept-000000.tar").mkdir(parents=True)
        with pytest.raises(OutputMismatchError, match="kept-000000.tar is a folder"):
            run(*job, tmp_path / "out", overwrite=True)


class TestRecords:
    def scored(self, tmp_path, mean, rows, name):
        made = [row(n, shard=shard, index=i, key=key, means=mean) for n, (shard, i, key) in enumerate(rows)]
        return open_scores(str(write_scores(tmp_path / name, made)))

    def test_other_scores_are_another_output(self, tmp_path, job):
        rows = all_rows(job[1] / "a.tar", "a.tar")
        for out, mean, name in (("out", 2, "a.parquet"), ("other", 4, "b.parquet")):
            run(self.scored(tmp_path, mean, rows, name), job[1], tmp_path / out, add_scores=True)
        assert read_back(tmp_path / "out") != read_back(tmp_path / "other")
        again = open_scores(str(tmp_path / "b.parquet"))
        with pytest.raises(OutputMismatchError, match="scores differs"):
            run(again, job[1], tmp_path / "out", add_scores=True)
        assert run(again, job[1], tmp_path / "other", add_scores=True).resumed == 1

    def test_stale_ones_are_dropped_where_no_shard_is(self, tmp_path, job):
        state = tmp_path / "out" / ".kept-reshard"
        state.mkdir(parents=True)
        (state / "kept-000001.tar.json").write_text("{}")
        (state / "plan.json").write_text("{}")
        bad = kept_rows(tmp_path, [("a.tar", 9, "x")], "bad.parquet")
        with pytest.raises(TableError):
            run(bad, job[1], tmp_path / "out")
        assert everything(state) == ["plan.json"]

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"zscore": 3}', b"\xff"])
    def test_a_damaged_index_is_refused_in_one_line(self, tmp_path, job, data):
        run(*job, tmp_path / "out")
        (tmp_path / "out" / "kept-index.json").write_bytes(data)
        with pytest.raises(OutputMismatchError, match="damaged kept-index.json.*--overwrite"):
            run(*job, tmp_path / "out")
        assert run(*job, tmp_path / "out", overwrite=True).samples == 6

    def test_the_table_is_read_once(self, tmp_path, monkeypatch):
        for name in "abc":
            make_tar(tmp_path / "src" / f"{name}.tar", samples(2, prefix=name))
        kept = kept_rows(tmp_path, [(f"{name}.tar", i, f"{name}{i:04d}") for name in "cab" for i in (1, 0)])
        reads = []
        fetch = module.fetch
        monkeypatch.setattr(module, "fetch", lambda *given: reads.append(given) or fetch(*given))
        run(kept, tmp_path / "src", tmp_path / "out", add_scores=True)
        assert len(reads) == 1
        assert [key for key, _ in read_back(tmp_path / "out")] == [f"{n}{i:04d}" for n in "abc" for i in (0, 1)]


class TestLitter:
    def test_a_refused_call_leaves_nothing(self, tmp_path, job):
        run(*job, tmp_path / "out")
        before = everything(tmp_path / "out")
        with pytest.raises(OutputMismatchError):
            run(*job, tmp_path / "out", shard_size="3")
        assert everything(tmp_path / "out") == before

    def test_what_a_killed_run_left_is_swept(self, tmp_path, job):
        hidden = ("-reshard/.plan.json.x.tmp", "-reshard-new/kept-000000.tar", "-reshard-new/.kept-000001.tar.x.tmp")
        for name in (f".kept{end}" for end in hidden):
            (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name).touch()
        for name in (".kept-000777.tar.x.tmp", ".kept-index.json.x.tmp", ".more-000000.tar.x.tmp"):
            (tmp_path / "out" / name).touch()
        run(*job, tmp_path / "out")
        assert everything(tmp_path / "out") == [".more-000000.tar.x.tmp", "kept-000000.tar", "kept-index.json"]


def test_links_that_stay_behind_are_told(tmp_path):
    link = tarfile.TarInfo("a.cls")
    link.type, link.linkname = tarfile.LNKTYPE, "z.cls"
    files = [(f"{key}.{suffix}", b"data") for key in "ab" for suffix in ("jpg", "txt")]
    source = make_tar(tmp_path / "src" / "a.tar", [link, *files])
    kept_rows(tmp_path, all_rows(source, "a.tar"))
    code, _, err = zscore(
        "reshard", tmp_path / "kept.parquet", "--shards", tmp_path / "src", "--out", tmp_path / "out", "--quiet"
    )
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("1 links inside kept samples stayed behind")
    assert raw_members(tmp_path / "out" / "kept-000000.tar") == raw_members(source)[1:]
