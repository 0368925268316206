"""Copying a range between files, by every way there is."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tars import FUZZ
from zscore import file_copy
from zscore.file_copy import copy_range, write_all
from zscore.records import Status
from zscore.stores import ShardFault

WAYS = {way.__name__: way for way in file_copy._ways}


@pytest.fixture
def files(tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "source").write_bytes(data)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield data, source, target
    os.close(source)
    os.close(target)


def content(target):
    return os.pread(target, 1 << 20, 0)


def test_the_kernel_comes_first():
    assert list(WAYS)[-1] == "_by_hand"
    if hasattr(os, "copy_file_range"):
        assert next(iter(WAYS)) == "_in_kernel"


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    ("start", "count"), [(0, 300_000), (1, 299_999), (512, 512), (123_457, 1), (300_000, 0), (7, 0)]
)
def test_every_way_copies_what_is_asked_for(files, monkeypatch, way, start, count):
    data, source, target = files
    monkeypatch.setattr(file_copy, "_ways", [WAYS[way]])
    write_all(target, b"before")
    copy_range(source, target, start, count)
    write_all(target, b"after")
    assert content(target) == b"before" + data[start : start + count] + b"after"
    assert os.lseek(source, 0, os.SEEK_CUR) == 0  # others may read from it


@pytest.mark.parametrize("way", list(WAYS))
def test_a_source_that_ends_early_is_a_fault(files, monkeypatch, way):
    data, source, target = files
    monkeypatch.setattr(file_copy, "_ways", [WAYS[way]])
    with pytest.raises(ShardFault) as caught:
        copy_range(source, target, 299_000, 5000)
    assert caught.value.failure.status == Status.TRUNCATED_SHARD
    assert "cut at byte 300000" in caught.value.failure.error
    assert content(target) == data[299_000:]


@pytest.mark.parametrize("code", sorted(file_copy._UNSUPPORTED))
def test_what_a_file_system_does_not_do_is_done_otherwise(files, monkeypatch, code):
    data, source, target = files
    calls = []

    def refuse(*arguments):
        calls.append(arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(file_copy, "_ways", [refuse, *WAYS.values()])
    copy_range(source, target, 100, 5000)
    assert len(calls) == 1
    assert content(target) == data[100:5100]


@pytest.mark.parametrize("ways", [1, 2])
def test_a_way_that_moves_nothing_is_not_the_end(files, monkeypatch, ways):
    """As copy_file_range does on files that the kernel makes up, and between some file systems."""
    data, source, target = files
    monkeypatch.setattr(file_copy, "_ways", [lambda *_: 0] * ways + list(WAYS.values())[ways:])
    copy_range(source, target, 100, 5000)
    assert content(target) == data[100:5100]


def test_other_errors_are_not_swallowed(files, monkeypatch):
    _, source, target = files

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_copy, "_ways", [full, *WAYS.values()])
    with pytest.raises(OSError, match="No space left"):
        copy_range(source, target, 0, 10)


def test_the_last_way_may_not_refuse(files, monkeypatch):
    _, source, target = files

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(file_copy, "_ways", [refuse])
    with pytest.raises(OSError, match="cross-device"):
        copy_range(source, target, 0, 10)


@FUZZ
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=8), st.integers(0, 5000))
def test_a_way_that_does_less_than_asked_is_called_again(tmp_path_factory, steps, start):
    folder = tmp_path_factory.mktemp("steps")
    data = os.urandom(20_000)
    (folder / "source").write_bytes(data)
    with (folder / "source").open("rb") as source, (folder / "target").open("w+b") as target:
        left = iter(steps)

        def some(source_file, target_file, at, count):
            return file_copy._by_hand(source_file, target_file, at, min(count, next(left, count)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file_copy, "_ways", [some])
            copy_range(source.fileno(), target.fileno(), start, 9000)
        assert content(target.fileno()) == data[start : start + 9000]


def test_write_all_goes_on_after_a_short_write(files, monkeypatch):
    _, _, target = files
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    write_all(target, b"0123456789")
    monkeypatch.undo()
    assert content(target) == b"0123456789"
