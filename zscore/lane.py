"""Calls that run one after the other in a thread beside the caller's, for work that mostly waits for the kernel."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = tuple[Callable[..., object], tuple[Any, ...]]


class Lane:
    """A thread that runs what it is given, in order, until something fails; then nothing more."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Call | threading.Event | None] = SimpleQueue()
        self._drops = False
        self.error: BaseException | None = None
        """What a call raised; `check` raises it."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, call: Callable[..., object], *arguments: Any) -> None:
        """Append a call."""
        self._calls.put((call, arguments))

    def wait(self) -> None:
        """Until all calls are done; an error stays for `check`."""
        self.mark().wait()

    def mark(self) -> threading.Event:
        """Set once all calls so far are done, or dropped after an error."""
        done = threading.Event()
        self._calls.put(done)
        return done

    def check(self) -> None:
        """Raise what a call raised."""
        if self.error is not None:
            raise self.error

    def stop(self, *, drop: bool = False) -> None:
        """End the thread; with `drop`, without what it hasn't begun."""
        self._drops = self._drops or drop
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if isinstance(call, threading.Event):
                call.set()
            elif not self._drops:
                self._try(*call)

    def _try(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it belongs to the caller
            self.error = error
            self._drops = True
