from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec
import pytest

from zscore import lease as lease_module
from zscore.errors import OutputError, OutputLockedError, UsageError
from zscore.lease import Lease
from zscore.store import identity, open_store, split_out


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    folder = str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out"
    return open_store(folder)


def put(store, name, data=b"data"):
    with store.write(name) as stream:
        stream.write(data)


def test_write_read_list_delete(store):
    assert store.names() == set()
    put(store, "a", b"1")
    put(store, "b", b"2")
    put(store, "a", b"3")
    assert store.names() == {"a", "b"}
    with store.open("a") as stream:
        assert stream.read() == b"3"
    store.delete("a")
    store.delete("a")
    assert store.names() == {"b"}
    store.delete_if_empty()
    assert store.names() == {"b"}
    store.delete("b")
    store.delete_if_empty()
    store.delete_if_empty()
    assert store.names() == set()


def test_a_failed_write_leaves_what_was_there(store):
    put(store, "a", b"old")
    with pytest.raises(RuntimeError), store.write("a") as stream:
        stream.write(b"new, but")
        raise RuntimeError
    with store.open("a") as stream:
        assert stream.read() == b"old"
    assert store.names() == {"a"}


def test_the_final_name_never_shows_a_half_written_file(tmp_path):
    store = open_store(str(tmp_path))
    with store.write("a") as stream:
        stream.write(b"half")
        stream.flush()
        assert not (tmp_path / "a").exists()
        assert store.names() == set()
    assert (tmp_path / "a").read_bytes() == b"half"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        put(open_store(str(tmp_path)), "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_second_lock_is_refused_and_the_first_can_be_taken_again(store):
    with store.lock("lock"), pytest.raises(OutputLockedError, match="another run"), store.lock("lock"):
        pass
    with store.lock("lock"):
        pass
    assert store.names() == set()


def hold(folder):
    with open_store(folder).lock("lock"):
        Path(folder, "held").touch()
        time.sleep(60)


def test_a_killed_holder_frees_a_local_lock(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    store = open_store(str(tmp_path))
    with pytest.raises(OutputLockedError), store.lock("lock"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with store.lock("lock"):
        pass


def test_sweep_takes_only_the_named_files_leftovers(tmp_path):
    for name in (".a.parquet.x.tmp", ".b.parquet.x.tmp", "a.parquet", ".a.parquet.kept"):
        (tmp_path / name).touch()
    open_store(str(tmp_path)).sweep(lambda name: name == "a.parquet")
    assert {entry.name for entry in tmp_path.iterdir()} == {".b.parquet.x.tmp", "a.parquet", ".a.parquet.kept"}
    open_store(str(tmp_path / "none")).sweep(lambda _: True)


def test_one_file_has_one_identity(tmp_path):
    (tmp_path / "a.tar").touch()
    (tmp_path / "link.tar").symlink_to("a.tar")
    path = str(tmp_path / "a.tar")
    for other in (f"file://{path}", f"local://{path}", str(tmp_path / "link.tar"), f"{tmp_path}/./a.tar"):
        assert identity(other) == identity(path)
    assert identity(str(tmp_path / "b.tar")) == identity(f"{tmp_path}/./b.tar") != identity(path)
    for other in ("memory:///bucket/a.tar", "memory://bucket/a.tar", "simplecache::memory://bucket/a.tar"):
        assert identity(other) == identity("memory://bucket/a.tar")
    assert identity("s3a://bucket/a.tar") == identity("s3://bucket/a.tar") != identity("memory://bucket/a.tar")
    assert identity("nothing://a") == ("nothing://a",)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_file_moves_in_from_a_folder_inside(tmp_path, where):
    folder = str(tmp_path) if where == "local" else f"memory://{uuid.uuid4().hex}"
    store, inside = open_store(folder), open_store(f"{folder}/.new")
    for filled, data in ((store, b"old"), (inside, b"new")):
        with filled.write("a") as stream:
            stream.write(data)
    store.adopt(".new", "a")
    with store.open("a") as stream:
        assert stream.read() == b"new"
    assert inside.names() == set()


def test_a_folder_cannot_be_deleted_as_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="can't write .*/a: "):
        open_store(str(tmp_path)).delete("a")


def test_a_stale_or_dead_lease_may_be_taken_and_a_live_one_not(monkeypatch):
    fs = fsspec.filesystem("memory")
    path = f"/{uuid.uuid4().hex}/lock"
    first = Lease(fs, path, "shown")
    first.acquire()
    with pytest.raises(OutputLockedError, match="process .* is writing to shown, last seen"):
        Lease(fs, path, "shown").acquire()
    monkeypatch.setattr(lease_module, "STALE_SECONDS", -1.0)
    second = Lease(fs, path, "shown")
    second.acquire()
    first.release()  # it is the second one's by now
    assert fs.exists(path)
    second.release()
    assert not fs.exists(path)


def test_a_holder_that_was_cut_off_neither_writes_nor_renews_once_it_is_replaced(monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.02)
    fs = fsspec.filesystem("memory")
    path = f"/{uuid.uuid4().hex}/lock"
    first = Lease(fs, path, "shown")
    first.acquire()
    first.check()
    monkeypatch.setattr(lease_module, "STALE_SECONDS", -1.0)
    second = Lease(fs, path, "shown")
    second.acquire()
    time.sleep(0.2)
    second.check()
    with pytest.raises(OutputLockedError, match="another run has taken over shown"):
        first.check()
    first.release()
    second.check()
    second.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"token": "x"}'])
def test_a_lease_that_can_t_be_understood_is_replaced(content):
    fs = fsspec.filesystem("memory")
    path = f"/{uuid.uuid4().hex}/lock"
    fs.pipe_file(path, content)
    lease = Lease(fs, path, "shown")
    lease.acquire()
    lease.release()
    assert not fs.exists(path)


def test_a_renewal_that_fails_with_anything_is_tried_again(monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.02)
    fs = fsspec.filesystem("memory")
    path = f"/{uuid.uuid4().hex}/lock"
    lease = Lease(fs, path, "shown")
    lease.acquire()
    before = lease._read()["renewed"]
    write, failed = lease._write, []

    def flaky(*, create):
        if not failed:
            failed.append(True)
            raise RuntimeError("not an OSError")
        write(create=create)

    monkeypatch.setattr(lease, "_write", flaky)
    deadline = time.monotonic() + 10
    while lease._read()["renewed"] == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert failed
    assert lease._read()["renewed"] > before
    lease.release()


def test_remote_trouble_of_any_kind_is_one_clear_line(monkeypatch):
    store = open_store(f"memory://{uuid.uuid4().hex}/out")

    class NotAnOSError(Exception):
        pass

    def broken(*_, **__):
        raise NotAnOSError("no\ncredentials")

    for method in ("ls", "open", "put_file", "rm_file", "cat_file"):
        monkeypatch.setattr(type(store._fs), method, broken)
    for use in (store.names, lambda: store.open("a"), lambda: put(store, "a"), lambda: store.delete("a")):
        with pytest.raises(OutputError, match="can't use memory://.*: no credentials: check the address"):
            use()
    with pytest.raises(OutputError, match="no credentials"), store.lock("lock"):
        pass


def test_an_error_of_the_caller_isn_t_blamed_on_the_output(store):
    with pytest.raises(FileNotFoundError, match="shard"), store.write("a"):
        raise FileNotFoundError("the shard is gone")


def test_a_lease_of_a_dead_process_of_this_machine_is_free(monkeypatch):
    fs = fsspec.filesystem("memory")
    path = f"/{uuid.uuid4().hex}/lock"
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    monkeypatch.setattr(os, "getpid", lambda: dead.pid)
    first = Lease(fs, path, "shown")
    first.acquire()
    monkeypatch.undo()
    second = Lease(fs, path, "shown")
    second.acquire()
    second.release()
    first.release()


def test_a_lease_is_renewed(monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.02)
    fs = fsspec.filesystem("memory")
    path = f"/{uuid.uuid4().hex}/lock"
    lease = Lease(fs, path, "shown")
    lease.acquire()
    before = lease._read()["renewed"]
    deadline = time.monotonic() + 10
    while lease._read()["renewed"] == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lease._read()["renewed"] > before
    lease.release()


def test_a_full_disk_is_one_clear_line(tmp_path):
    """A file-size limit stands for the full disk: the same code path, with EFBIG for ENOSPC."""
    store = open_store(str(tmp_path), resumes=True)
    put(store, "a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OutputError, match=r"can't write .*/a: .*free some space; finished shards are kept"):
            put(store, "a", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_can_t_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="check that the folder exists"):
        put(open_store(str(tmp_path / "file" / "out")), "a")
    with pytest.raises(OutputError, match="can't write"), open_store("/proc/nothing").lock("lock"):
        pass


@pytest.mark.parametrize("resumes", [False, True])
def test_only_what_resumes_speaks_of_finished_shards(tmp_path, resumes):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        put(open_store(str(tmp_path / "file"), resumes=resumes), "a")
    assert ("finished shards are kept and the same command resumes" in str(caught.value)) is resumes


def test_out_needs_a_file_name_and_a_known_protocol():
    assert split_out("a.parquet") == (".", "a.parquet")
    assert split_out("/a.parquet") == ("/", "a.parquet")
    assert split_out("s3://b/c/a.parquet") == ("s3://b/c", "a.parquet")
    with pytest.raises(UsageError, match="no file name"):
        split_out("a/")
    with pytest.raises(UsageError, match="names no bucket or folder"):
        split_out("s3://scores.parquet")
    with pytest.raises(UsageError, match="can't write to nosuch://x"):
        open_store("nosuch://x")
