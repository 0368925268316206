"""Shards behind a web server: with ranges, without, behind errors that pass and errors that stay."""

from __future__ import annotations

import contextlib
import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.tars import END, check_rows, pair, statuses
from zscore.errors import ShardNotFoundError, UsageError
from zscore.records import ShardRef
from zscore.samples import ReadOptions, count_samples, read_samples
from zscore.shards import expand
from zscore.stores import is_final, reason

FAST = ReadOptions(retry_wait=0.001)
LARGE = b"".join(pair(f"{i}", bytes([i]) * 2_500_000) for i in range(8)) + END


class Web:
    """What the server has, and how it misbehaves."""

    def __init__(self):
        self.files = {}
        self.ranges = True
        self.lengths = True
        self.failures = []
        """Statuses that the next GETs answer with; 0 drops the connection in the middle."""
        self.gets = 0
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(self.server.web, body=False)

    def do_GET(self):
        self.server.web.gets += 1
        self.answer(self.server.web, body=True)

    def answer(self, web, body):
        failure = web.failures.pop(0) if web.failures and body else None
        data = web.files.get(self.path.partition("?")[0])
        if failure or data is None:
            self.send_error(failure or 404)
            return
        data = self.begin(web, data)
        if web.lengths:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
        self.close_connection = failure == 0 or not web.lengths
        self.send_header("ETag", '"v1"')
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has seen enough
            self.wfile.write(data[: len(data) // 2] if failure == 0 else data if body else b"")

    def begin(self, web, data):
        wanted = self.headers.get("Range")
        if not wanted or not web.ranges:
            self.send_response(200)
            return data
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
        return data[first : last + 1]


@pytest.fixture
def web():
    web = Web()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.web = web
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    web.files = {"/d/a.tar": LARGE, "/d/b.tgz": gzip.compress(LARGE, 1), "/d/empty.tar": b"", "/d/get": LARGE}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web
    server.shutdown()
    server.server_close()
    thread.join()


def rows_of(web, name="d/a.tar", options=FAST):
    rows = list(read_samples(ShardRef(f"{web.url}/{name}", "shard.tar", -1, ""), options))
    check_rows(rows)
    return rows


def assert_whole(rows):
    assert statuses(rows) == ["ok"] * 8
    assert [row.image[:1] for row in rows] == [bytes([i]) for i in range(8)]


def test_single_urls_and_braces(web):
    shards = expand([f"{web.url}/d/a.tar", f"{web.url}/d/{{b.tgz,a.tar}}"])
    assert [(shard.name, shard.version) for shard in shards] == [("a.tar", "v1"), ("b.tgz", "v1")]
    assert shards[0].size == len(LARGE)
    for shard in shards:
        rows = list(read_samples(shard, FAST))
        assert statuses(rows) == ["ok"] * 8


def test_a_url_needs_no_ending(web):
    (shard,) = expand([f"{web.url}/d/get?file=1.tar&token=SECRET"])
    assert shard.name == "get"
    assert "SECRET" in shard.url
    assert_whole(list(read_samples(shard, FAST)))


def test_names_carry_no_secrets_and_stay_unique(web):
    shards = expand([f"{web.url}/d/get?file={i}&token=SECRET" for i in range(3)])
    assert len({shard.name for shard in shards}) == 3
    for shard in shards:
        assert shard.name.startswith("get#")
        assert "SECRET" not in shard.name


def test_what_is_not_there(web):
    with pytest.raises(ShardNotFoundError, match=r"d/no\.tar"):
        expand([f"{web.url}/d/no.tar"])
    with pytest.raises(ShardNotFoundError, match="1 of the 2"):
        expand([f"{web.url}/d/{{a,c}}.tar"])


@pytest.mark.parametrize("pattern", ["d/*.tar", "d/"])
def test_what_cannot_be_listed(web, pattern):
    with pytest.raises(UsageError, match="listed over http"):
        expand([f"{web.url}/{pattern}"])


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("name", ["d/a.tar", "d/b.tgz"])
def test_servers_of_every_kind(web, ranges, lengths, name):
    web.ranges, web.lengths = ranges, lengths
    assert_whole(rows_of(web, name))
    shard = ShardRef(f"{web.url}/{name}", "shard.tar", -1, "")
    assert count_samples(shard, FAST) == 8
    assert statuses(rows_of(web, name, ReadOptions(max_image_bytes=9))) == ["image_too_large"] * 8


def test_an_empty_answer(web):
    assert statuses(rows_of(web, "d/empty.tar")) == ["truncated_shard"]


@pytest.mark.parametrize("failures", [[503], [0], [429, 503], [0, 0]])
@pytest.mark.parametrize("ranges", [True, False])
def test_errors_that_pass_cost_nothing(web, failures, ranges):
    web.ranges = ranges
    web.failures = failures
    assert_whole(rows_of(web))
    assert not web.failures


def test_errors_in_the_middle_that_pass(web):
    rows = []
    for row in read_samples(ShardRef(f"{web.url}/d/a.tar", "shard.tar", -1, ""), FAST):
        rows.append(row)
        if row.index in {1, 4}:
            web.failures = [503, 0]
    assert_whole(rows)


def test_errors_that_stay_are_one_row_behind_what_came_before(web):
    rows = []
    for row in read_samples(ShardRef(f"{web.url}/d/a.tar?token=SECRET", "shard.tar", -1, ""), FAST):
        rows.append(row)
        web.failures = [503] * 99
    check_rows(rows)
    assert len(rows) < 8
    assert statuses(rows) == ["ok"] * (len(rows) - 1) + ["unreadable_shard"]
    assert "503" in rows[-1].failure.error
    assert "3 attempts" in rows[-1].failure.error
    assert "SECRET" not in rows[-1].failure.error


@pytest.mark.parametrize(("status", "gets"), [(404, 1), (403, 1), (401, 1), (500, 3), (503, 3), (429, 3)])
def test_only_errors_that_may_pass_are_tried_again(web, status, gets):
    shard = ShardRef(f"{web.url}/d/a.tar", "shard.tar", -1, "")
    rows = read_samples(shard, FAST)
    next(rows)
    web.failures = [status] * 99
    web.gets = 0
    rest = list(rows)
    assert statuses(rest)[-1] == "unreadable_shard"
    assert str(status) in rest[-1].failure.error
    assert web.gets == gets


def test_one_attempt_is_one(web):
    web.failures = [503] * 99
    rows = rows_of(web, options=ReadOptions(attempts=1))
    assert statuses(rows) == ["unreadable_shard"]
    assert "attempts" not in rows[0].failure.error


def test_nobody_listens():
    rows = list(read_samples(ShardRef("http://127.0.0.1:9/x.tar?token=SECRET", "shard.tar", -1, ""), FAST))
    check_rows(rows)
    assert statuses(rows) == ["unreadable_shard"]
    assert "3 attempts" in rows[0].failure.error
    assert "SECRET" not in rows[0].failure.error
    (shard,) = expand(["http://user:SECRET@127.0.0.1:9/x.tar"])
    assert (shard.name, shard.size, shard.version) == ("x.tar", -1, "")


def test_a_shard_that_is_not_the_same_any_more(web):
    rows = []
    for row in read_samples(ShardRef(f"{web.url}/d/a.tar", "shard.tar", -1, ""), FAST):
        rows.append(row)
        if row.index == 0:
            web.files["/d/a.tar"] = LARGE + END
            web.failures = [503]
    assert "overwritten" in rows[-1].failure.error


def test_versions_are_the_same_in_a_listing_and_alone():
    import fsspec

    fsspec.filesystem("memory").pipe("/v/deep/x.tar", pair("a") + END)
    (listed,) = expand(["memory://v"])
    (alone,) = expand(["simplecache::memory://v/deep/x.tar"])
    assert (listed.name, alone.name) == ("deep/x.tar", "x.tar")
    assert listed.version == alone.version
    assert [row.key for shard in (listed, alone) for row in read_samples(shard)] == ["a", "a"]


def test_reasons():
    assert reason(OSError(5, "Input/output error", "/data/x.tar")) == "Input/output error"
    assert reason(ValueError("two\nlines  here")) == "two lines here"
    assert reason(KeyError()) == "KeyError"
    assert reason(ValueError("GET https://u:p@h/x?Signature=abc&x=1 failed")) == "GET https://…@h/x?… failed"
    assert len(reason(ValueError("x" * 1000))) == 300
    assert is_final(FileNotFoundError())
    assert not is_final(TimeoutError())
    assert not is_final(OSError(5, "Input/output error"))
