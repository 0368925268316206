"""Input arguments on this machine: what they stand for, in which order, under which names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.tars import END, pair
from zscore.errors import ShardNotFoundError, UsageError
from zscore.samples import read_samples
from zscore.shards import expand


@pytest.fixture
def folder(tmp_path):
    """Shards and other things, as datasets come."""
    for name in (
        "b.tar",
        "a.tar",
        "a/2.tar",
        "a/10.tar.gz",
        "a-b/1.tgz",
        "c/UPPER.TAR",
        "LICENSE",
        "00000.parquet",
        "stats.json",
        "a/notes.txt",
        "x.tar.part",
        "tar",
        ".hidden.tar",
        "._b.tar",
        ".cache/x.tar",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pair("a") + END)
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "folder.tar").mkdir()
    (tmp_path / "in" / "folder.tar" / "inside.tar").write_bytes(END)
    return tmp_path / "in"


ALL = ["a/10.tar.gz", "a/2.tar", "a-b/1.tgz", "a.tar", "b.tar", "c/UPPER.TAR", "folder.tar/inside.tar"]


def names(*inputs):
    return [shard.name for shard in expand([str(value) for value in inputs])]


def test_a_folder_is_every_shard_below_it(folder):
    assert names(folder) == ALL
    assert names(f"{folder}/") == ALL
    assert names(f"file://{folder}") == ALL


def test_a_shard_knows_where_it_lies(folder):
    os.utime(folder / "b.tar", ns=(1, 1_234_567_890_123))
    (shard,) = expand([str(folder / "b.tar")])
    assert (shard.url, shard.name) == (str(folder / "b.tar"), "b.tar")
    assert (shard.size, shard.version) == (len(pair("a") + END), "1234567890123")
    assert [row.key for row in read_samples(shard)] == ["a"]


def test_relative_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names(".") == ALL
    assert names("a") == ["10.tar.gz", "2.tar"]
    assert names("../in/b.tar", "b.tar", "./b.tar", "a/../b.tar", folder / "b.tar") == ["b.tar"]
    assert names("*.tar") == ["a.tar", "b.tar", "folder.tar/inside.tar"]
    assert all(shard.url.startswith("/") for shard in expand(["."]))


def test_globs(folder):
    assert names(folder / "*.tar") == ["a.tar", "b.tar", "folder.tar/inside.tar"]
    assert names(folder / "a*" / "*") == ["a/10.tar.gz", "a/2.tar", "a-b/1.tgz"]
    assert names(folder / "[ab].tar") == ["a.tar", "b.tar"]
    assert names(folder / "?" / "*.tar*") == ["a/10.tar.gz", "a/2.tar"]
    assert sorted(names(folder / "**")) == sorted(ALL)
    assert names(folder / "**" / "*.tgz") == ["a-b/1.tgz"]
    assert sorted(names(folder / "*")) == sorted(ALL)


def test_braces(folder):
    assert names(folder / "{b,a}.tar") == ["b.tar", "a.tar"]
    assert names(folder / "a" / "{2..2}.tar") == ["2.tar"]
    assert names(folder / "{a,a-b}" / "*") == ["a/10.tar.gz", "a/2.tar", "a-b/1.tgz"]
    assert names(folder / "{a,c}") == ["a/10.tar.gz", "a/2.tar", "c/UPPER.TAR"]


def test_several_arguments_keep_their_order_and_each_shard_comes_once(folder):
    assert names(folder / "b.tar", folder / "a.tar") == ["b.tar", "a.tar"]
    assert names(folder / "c", folder / "b.tar", folder) == [
        "c/UPPER.TAR",
        "b.tar",
        *(n for n in ALL if n[0] not in "bc"),
    ]


def test_names_are_relative_to_what_the_inputs_share(folder):
    assert names(folder / "a", folder / "a-b") == ["a/10.tar.gz", "a/2.tar", "a-b/1.tgz"]
    assert names(folder / "a" / "2.tar") == ["2.tar"]
    assert names(folder / "a" / "2.tar", folder / "b.tar") == ["a/2.tar", "b.tar"]
    assert names(folder / "a" / "2.tar", folder / "a" / "10.tar.gz") == ["2.tar", "10.tar.gz"]


def test_a_name_does_not_depend_on_what_else_a_folder_holds(folder):
    lone = folder / "lone"
    (lone / "x").mkdir(parents=True)
    (lone / "x" / "1.tar").write_bytes(END)
    before = names(lone)
    (lone / "2.tar").write_bytes(END)
    assert before == ["x/1.tar"]
    assert names(lone) == ["2.tar", "x/1.tar"]


def test_what_is_no_shard_is_ignored_as_the_shell_gives_it(folder):
    listed = sorted(path for path in folder.glob("[!.]*") if path.is_file())
    assert names(*listed) == ["a.tar", "b.tar"]


def test_a_hidden_shard_that_is_named_is_meant(folder):
    assert names(folder / ".hidden.tar") == [".hidden.tar"]


def test_magic_characters_in_names_that_exist(folder):
    odd = folder / "run[1]{a,b}*"
    odd.mkdir()
    (odd / "x{0..1}.tar").write_bytes(END)
    assert names(odd) == ["x{0..1}.tar"]
    assert names(odd / "x{0..1}.tar") == ["x{0..1}.tar"]
    assert names(odd / "*.tar") == ["x{0..1}.tar"]


def test_links(folder, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blob.tar").write_bytes(END)
    (folder / "linked").symlink_to(tmp_path / "store")
    (folder / "link.tar").symlink_to(tmp_path / "store" / "blob.tar")
    (folder / "dangling.tar").symlink_to("nowhere")
    (tmp_path / "store" / "circle").symlink_to(folder)
    assert [name for name in names(folder) if "link" in name] == ["link.tar", "linked/blob.tar"]
    # Data that wasn't fetched is a shard that can't be read, and not one that isn't there.
    assert "dangling.tar" in names(folder)
    with pytest.raises(ShardNotFoundError, match=r"dangling\.tar' is a link to 'nowhere', which isn't there"):
        expand([str(folder / "dangling.tar")])
    (tmp_path / "current").symlink_to(folder)
    assert names(tmp_path / "current", folder)[: len(ALL)] == names(folder)[: len(ALL)]


def test_what_is_called_like_a_shard_but_is_no_file(folder):
    os.mkfifo(folder / "fifo.tar")
    assert names(folder) == ALL
    with pytest.raises(ShardNotFoundError):
        expand([str(folder / "fifo.tar")])


def test_names_that_are_no_utf8(folder):
    (folder / "x").mkdir()
    for byte in (b"\xff", b"\xfe"):
        (folder / "x" / os.fsdecode(byte + b".tar")).write_bytes(pair("a") + END)
    shards = expand([str(folder / "x")])
    assert [shard.name for shard in shards] == ["\\xfe.tar", "\\xff.tar"]
    assert [row.shard for shard in shards for row in read_samples(shard)] == ["\\xfe.tar", "\\xff.tar"]


def test_names_are_unique(folder):
    (folder / "x").mkdir()
    for name in (b"\xff.tar", b"\\xff.tar"):
        (folder / "x" / os.fsdecode(name)).write_bytes(END)
    found = names(folder / "x")
    assert len(set(found)) == 2
    assert all(name.startswith("\\xff.tar#") for name in found)
    assert found == names(folder / "x")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], ["no inputs"]),
        (["aa.tar"], ["aa.tar", "near it", "'a.tar'"]),
        (["a/3.tar"], ["a/3.tar", "'2.tar'"]),
        (["zzzzzzzzz"], ["zzzzzzzzz", ".tar.gz or .tgz"]),
        (["no/such/x.tar"], ["no/such/x.tar"]),
        (["empty"], ["empty"]),
        (["LICENSE"], ["LICENSE", ".tar.gz or .tgz"]),
        (["LICENSE", "stats.json"], ["LICENSE", "stats.json"]),
        (["*.parquet"], ["*.parquet"]),
        (["nothing*"], ["nothing*"]),
        (["b.tar", "nothing*"], ["nothing*"]),
        (["b.tar", "empty"], ["empty"]),
        (["{a,b,y,z}.tar"], ["2 of the 4 paths", "y.tar", "z.tar"]),
        (["{000..999}.tar"], ["1000 of the 1000", "000.tar", "…"]),
        (["a/{2,3}.tar"], ["1 of the 2", "3.tar"]),
        (["x" * 5000 + "{a,b}.tar"], ["2 of the 2"]),
    ],
)
def test_what_leads_to_no_shard(folder, monkeypatch, inputs, words):
    monkeypatch.chdir(folder)
    with pytest.raises(ShardNotFoundError) as caught:
        expand(inputs)
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).isprintable()


def test_brace_bombs(folder):
    with pytest.raises(UsageError, match="the limit is 1000000"):
        expand([str(folder / "{0..99999999999}.tar")])


def test_a_folder_that_cannot_be_read(folder):
    (folder / "a").chmod(0)
    try:
        if os.access(folder / "a", os.R_OK):
            pytest.skip("root may read anything")
        with pytest.raises(UsageError, match="Permission denied"):
            expand([str(folder)])
    finally:
        (folder / "a").chmod(0o755)


def test_local_shards_start_without_fsspec(folder):
    code = (
        "import sys; from zscore.shards import expand; from zscore.samples import read_samples\n"
        f"print(sum(len(list(read_samples(shard))) for shard in expand([{str(folder)!r}])))\n"
        "assert not {'fsspec', 'tenacity', 'asyncio', 'webdataset', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(ALL) - 1
