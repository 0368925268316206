"""Decode workers: processes that turn picture files into patches beside the engine, and may die of one.

A worker is a fresh interpreter that imports numpy, Pillow and simplejpeg, but no torch. It is started with
subprocess and not with multiprocessing, which would run the caller's main module again in every worker.

    parent                                                 worker
    pwrite(slot, file), (size, slot) → jobs pipe        →  reader thread → queue → pread(slot), decode, patch
    preadv(slot, array) ← replies pipe, a JSON object   ←  pwrite(slot, patches)

Bulk data goes through a worker's slots, two anonymous files (memfd), so that the next picture can be decoded
while the last one's patches wait. Messages are shorter than PIPE_BUF, hence whole or not there, so that the
parent never blocks on a worker that has stopped. 3 MB of patches cost 1.8 ms that way, both processes together,
against 7 to 10 ms as bytes through a pipe and 10 to 14 ms as a pickle. Replies are JSON: what a hostile picture
may have made of a worker must not reach the parent as a pickle. memfd and the parent-death signal are Linux's:
elsewhere, ask for no workers.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from PIL import AvifImagePlugin

from zscore import images
from zscore.errors import EngineError
from zscore.patches import PixelOptions
from zscore.records import Failure, Pixels, Status

SLOTS = 2
"""Jobs that a worker may hold: one in the making, one waiting, so that it needn't wait for the parent's next look."""

_START_S = 60.0
"""A worker that hasn't said by then that it is ready can't be used; it usually takes 0.3 s."""

_MAX_STILLBORN = 3
"""Workers in a row that end before they are ready, after which the fault is taken to lie in the installation."""

_GRACE_S = 1.0
"""A worker ends itself at the time limit; the parent does it this much later, if the worker can't."""

_LOOK_S = 2.0
"""How often a worker looks whether its parent lives: a process that it forked may hold its end of the pipe, too."""

_KEEP_BYTES = 16 << 20
"""A slot that a large file has swollen past this gives its memory back."""

_ADDRESS_SPACE = 4 << 30
"""Of a worker, in bytes; beyond, it is a MemoryError. Pictures at the default size limit take up to 1.6 GB (WebP)."""

_JOB = struct.Struct("<QB")  # a message of the jobs pipe: bytes in the slot, number of the slot

_BOOT = """
import json, sys
config = json.loads(sys.argv[1])
sys.path[:] = config["path"]
__import__("zscore.workers").workers.serve(config)
"""


class Decoded(NamedTuple):
    """What became of one submitted picture."""

    tag: int
    outcome: Pixels | Failure
    sha256: str
    """Of the picture's file, in hex."""


class _Job(NamedTuple):
    tag: int
    data: bytes


class DecodePool:
    """Decodes pictures in worker processes; for use by one thread at a time.

    The caller bounds what is in flight (`in_flight`, `capacity`); results come in any order, told apart by their
    tags. With no workers, `submit` decodes in this process, and no time or memory limit holds.
    """

    def __init__(self, options: PixelOptions, *, workers: int, timeout_s: float = 60.0) -> None:
        self._options = options
        self._timeout_s = timeout_s
        self._backlog: deque[_Job] = deque()
        self._done: list[Decoded] = []
        self._workers: list[_Worker] = []
        self._inline = workers == 0
        self._stillborn = 0
        for _ in range(workers):
            self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once; what is in flight is forgotten."""
        while self._workers:
            self._workers.pop().end()
        self._backlog.clear()
        self._done.clear()

    @property
    def capacity(self) -> int:
        """Pictures that keep every worker busy; more in flight only wait in this process."""
        return max(1, SLOTS * len(self._workers))

    @property
    def in_flight(self) -> int:
        """Pictures submitted whose results haven't been returned."""
        return len(self._backlog) + len(self._done) + sum(len(worker.jobs) for worker in self._workers)

    @property
    def waitables(self) -> list[Connection]:
        """What `multiprocessing.connection.wait` or a selector can wait on beside other things.

        One turns readable when `results` has something to do. A replaced worker brings a new one: ask each time.
        """
        return [worker.replies for worker in self._workers]

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, tag: int, data: bytes) -> None:
        """Hand in a picture file; never waits for a worker. Raises as `results` does."""
        if self._workers:
            self._backlog.append(_Job(tag, data))
            self._dispatch()
        else:
            assert self._inline, "the pool is closed"
            outcome = images.load(data, self._options)
            self._done.append(Decoded(tag, outcome, hashlib.sha256(data).hexdigest()))

    def results(self, timeout: float | None = 0.0) -> list[Decoded]:
        """Return what is finished; wait for the first up to `timeout` seconds, or until there is one if None.

        Raises:
            EngineError: workers can't be started.
        """
        give_up = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            self._collect()
            self._end_overdue()
            self._dispatch()
            remaining = give_up - time.monotonic()
            if self._done or remaining <= 0 or not self.in_flight:
                done, self._done = self._done, []
                return done
            deadline = min(worker.deadline for worker in self._workers) - time.monotonic()
            wait(self.waitables, max(0.0, min(remaining, deadline)))

    def _dispatch(self) -> None:
        while self._backlog:
            worker = min(self._workers, key=lambda worker: len(worker.jobs))
            if len(worker.jobs) >= SLOTS:
                return
            if worker.send(self._backlog[0]):
                self._backlog.popleft()
            else:
                self._replace(worker)

    def _collect(self) -> None:
        for worker in list(self._workers):
            try:
                while worker.replies.poll():
                    decoded = worker.receive()
                    if decoded is not None:
                        self._done.append(decoded)
            except EOFError:
                self._replace(worker)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if now >= worker.deadline:
                self._replace(worker, overdue=True)

    def _replace(self, worker: _Worker, *, overdue: bool = False) -> None:
        """Put a new worker in the place of a dead or stuck one; the job that it was at is to blame, if any."""
        self._workers.remove(worker)
        code, busy = worker.end()
        self._stillborn = 0 if worker.ready else self._stillborn + 1
        if self._stillborn == _MAX_STILLBORN:
            self.close()
            raise EngineError(
                f"decode workers don't start (exit code {code} for {_MAX_STILLBORN} in a row): what they print "
                "stands above; without workers, pictures are decoded in this process"
            )
        if busy:
            job = worker.jobs.popleft()
            failure = Failure(Status.BAD_IMAGE, _cause(code, self._timeout_s, overdue=overdue))
            self._done.append(Decoded(job.tag, failure, hashlib.sha256(job.data).hexdigest()))
        self._backlog.extendleft(reversed(worker.jobs))
        self._start()

    def _start(self) -> None:
        try:
            self._workers.append(_Worker(self._options, self._timeout_s))
        except OSError as error:
            self.close()
            raise EngineError(f"can't start a decode worker: {error}") from error


def _cause(code: int, timeout_s: float, *, overdue: bool) -> str:
    if overdue or code == -signal.SIGALRM:
        return f"decoding took longer than {timeout_s:g} s"
    how = f"signal {-code}: {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
    return f"decoder crashed ({how})"


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, options: PixelOptions, timeout_s: float) -> None:
        self.jobs: deque[_Job] = deque()
        """Sent, and not answered yet; oldest first, which is the order of the answers."""
        self.ready = False
        self._timeout_s = timeout_s
        self._patch = options.patch
        self._since = time.monotonic()
        self._sent = self._answered = 0
        self._slots = [os.memfd_create(f"zscore-slot-{number}") for number in range(SLOTS)]
        self._ledger = os.memfd_create("zscore-ledger")  # how many jobs it has taken up; outlives it
        jobs_read, jobs_write = os.pipe()
        replies_read, replies_write = os.pipe()
        self.replies = Connection(replies_read, writable=False)
        self._jobs = Connection(jobs_write, readable=False)
        config = {
            "path": sys.path,
            "jobs": jobs_read,
            "replies": replies_write,
            "slots": self._slots,
            "ledger": self._ledger,
            "timeout_s": timeout_s,
            "options": asdict(options),
            "parent": os.getpid(),
            # Linux sends the parent-death signal when the *thread* that started the child ends.
            "die_with_parent": threading.current_thread() is threading.main_thread(),
        }
        try:
            self.process = _launch(config)
        except OSError:
            self._close_files()
            raise
        finally:
            os.close(jobs_read)
            os.close(replies_write)

    @property
    def busy(self) -> bool:
        """Whether it has taken up the oldest job; otherwise its death isn't that picture's fault."""
        return int.from_bytes(os.pread(self._ledger, 8, 0), "little") > self._answered

    @property
    def deadline(self) -> float:
        """When, on the monotonic clock, this worker is to be given up; infinity while it has nothing to do."""
        if not self.ready:
            return self._since + _START_S
        return self._since + self._timeout_s + _GRACE_S if self.jobs else float("inf")

    def send(self, job: _Job) -> bool:
        """Pass on a job; False if the worker has died."""
        slot = self._sent % SLOTS
        try:
            os.pwrite(self._slots[slot], job.data, 0)
            self._jobs.send_bytes(_JOB.pack(len(job.data), slot))
        except BrokenPipeError:
            return False
        if not self.jobs:
            self._since = time.monotonic()
        self.jobs.append(job)
        self._sent += 1
        return True

    def receive(self) -> Decoded | None:
        """Read one reply; None for the one that says that the worker is ready."""
        reply = json.loads(self.replies.recv_bytes())
        self._since = time.monotonic()
        if not self.ready:
            self.ready = True
            return None
        slot = self._slots[self._answered % SLOTS]
        self._answered += 1
        outcome: Pixels | Failure
        if "error" in reply:
            outcome = Failure(Status(reply["status"]), reply["error"])
        else:
            rows, columns = reply["grid"]
            patches_NCPP = np.empty((rows * columns, 3, self._patch, self._patch), np.uint8)
            read = os.preadv(slot, [patches_NCPP.data], 0)
            assert read == patches_NCPP.nbytes
            outcome = Pixels(patches_NCPP, (rows, columns), reply["width"], reply["height"])
        if os.fstat(slot).st_size > _KEEP_BYTES:
            os.ftruncate(slot, 0)
        return Decoded(self.jobs.popleft().tag, outcome, reply["sha256"])

    def end(self) -> tuple[int, bool]:
        """Kill the process if it lives; return its exit code, and whether a picture was at work in it."""
        self.process.kill()
        code, busy = self.process.wait(), self.busy
        self._close_files()
        return code, busy

    def _close_files(self) -> None:
        self.replies.close()
        self._jobs.close()
        for file in (self._ledger, *self._slots):
            os.close(file)


def _launch(config: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603  our own interpreter and text
        [sys.executable, "-P", "-c", _BOOT, json.dumps(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(config["jobs"], config["replies"], config["ledger"], *config["slots"]),
        process_group=0,  # Ctrl-C in the terminal is the parent's affair, also while Python starts
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )


def serve(config: dict[str, Any]) -> NoReturn:
    """Be a worker: decode what the jobs pipe announces."""
    _confine(config)
    queue: SimpleQueue[tuple[int, int]] = SimpleQueue()
    jobs = Connection(config["jobs"], writable=False)
    threading.Thread(target=_read_jobs, args=(jobs, queue, config["parent"]), daemon=True).start()
    replies = Connection(config["replies"], readable=False)
    replies.send_bytes(b"{}")
    # libtiff and others print to the terminal; until here, a failed start could say so.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    options = PixelOptions(**config["options"])
    taken = 0
    while True:
        size, number = queue.get()
        taken += 1
        os.pwrite(config["ledger"], taken.to_bytes(8, "little"), 0)
        slot = config["slots"][number]
        data = os.pread(slot, size, 0)
        signal.setitimer(signal.ITIMER_REAL, config["timeout_s"])
        outcome = images.load(data, options)
        sha256 = hashlib.sha256(data).hexdigest()
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply: dict[str, Any] = {"sha256": sha256}
        if isinstance(outcome, Failure):
            reply |= {"status": outcome.status, "error": outcome.error}
        else:
            os.pwrite(slot, outcome.patches_NCPP.data, 0)
            reply |= {"grid": outcome.grid, "width": outcome.width, "height": outcome.height}
        replies.send_bytes(json.dumps(reply, ensure_ascii=False).encode())


def _read_jobs(jobs: Connection, queue: SimpleQueue[tuple[int, int]], parent: int) -> NoReturn:
    """Read ahead of the decoder, and end the process with its parent, of which a closed pipe tells at once."""
    while True:
        try:
            if jobs.poll(_LOOK_S):
                queue.put(_JOB.unpack(jobs.recv_bytes()))
        except EOFError:
            parent = 0
        if os.getppid() != parent:
            os._exit(0)


def _confine(config: dict[str, Any]) -> None:
    """Make this process small, polite, and mortal."""
    if config["die_with_parent"]:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != config["parent"]:  # it was gone before the call
            os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever C code it is in
    os.nice(10)  # the engine's threads go first
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _ADDRESS_SPACE if most == resource.RLIM_INFINITY else min(_ADDRESS_SPACE, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    warnings.simplefilter("ignore")
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
