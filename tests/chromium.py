"""Drives a headless Chromium over the DevTools protocol, through a pair of pipes: no driver, no port, no library.

with Browser.start(folder) as browser:
    page = browser.open(path, width=375, dark=True)
    page.eval("document.title")
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# The pipes must have these numbers in the browser's process.
READS, WRITES = 3, 4
PATIENCE = 90
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)


def find() -> str | None:
    """The browser of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process; pages are opened one after the other, each fresh."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self._process = process
        self._commands = commands
        self._answers = answers
        self._rest = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    @classmethod
    @contextlib.contextmanager
    def start(cls, folder: Path) -> Iterator[Browser]:
        """Start with an empty profile under `folder`."""
        path = find()
        assert path is not None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Out of the way of 3 and 4, whatever numbers the pipes got.
        theirs = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20) for descriptor in (theirs_in, theirs_out)]

        def number_pipes() -> None:
            os.dup2(theirs[0], READS)
            os.dup2(theirs[1], WRITES)

        with (folder / "chromium.log").open("wb") as log:
            process = subprocess.Popen(
                [path, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=number_pipes,  # noqa: PLW1509  runs before any thread is started
                pass_fds=(READS, WRITES),
            )
        for descriptor in (theirs_in, theirs_out, *theirs):
            os.close(descriptor)
        browser = cls(process, ours_out, ours_in)
        try:
            yield browser
        finally:
            with contextlib.suppress(OSError, AssertionError):
                browser.call("Browser.close")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
            os.close(ours_out)
            os.close(ours_in)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what happens in between goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._commands, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next(PATIENCE)
            assert answer is not None, f"no answer to {method} in {PATIENCE} s"
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> dict[str, Any]:
        """The next event of this kind, or one that came since the list was cleared."""
        until = time.monotonic() + PATIENCE
        while True:
            for event in self.events:
                if event.get("method") == method:
                    return event
            event = self._next(until - time.monotonic())
            assert event is not None, f"no {method} in {PATIENCE} s"
            self.events.append(event)

    def _next(self, seconds: float) -> dict[str, Any] | None:
        until = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0, until - time.monotonic()))
            data = os.read(self._answers, 1 << 20) if ready else b""
            if not data:
                return None
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, **more: Any) -> Page:
        """Load a file in a fresh tab; returns when it has been drawn.

        Args:
            path: of the page.
            width: of the window, in CSS pixels.
            height: of the window.
            dark: what the system prefers.
            more: `reduced` motion, `scripts` allowed, `scale` (device pixels a CSS pixel).
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=more.get("scale", 1),
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        features.append(
            {"name": "prefers-reduced-motion", "value": "reduce" if more.get("reduced") else "no-preference"}
        )
        page.call("Emulation.setEmulatedMedia", features=features)
        page.call("Emulation.setScriptExecutionDisabled", value=not more.get("scripts", True))
        self.events.clear()
        page.call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired")
        if more.get("scripts", True):
            page.settle()
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this tab."""
        return self._browser.call(method, self._session, **params)

    def eval(self, code: str) -> Any:
        """The value of an expression; promises are awaited. Works with the page's own scripts forbidden, too."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def settle(self) -> None:
        """Wait until what was asked for is on the screen."""
        self.eval("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))")

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, as a person would."""
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                code = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}[key]
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        self.settle()

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        """Save what is to be seen as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(b64decode(shot["data"]))

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and violations of the page's policy."""
        found = []
        for event in self._of_session():
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(str(params["args"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
                found.append(params["entry"]["text"])
        return found

    @property
    def dialogs(self) -> int:
        """How many alerts came up."""
        return sum(event["method"] == "Page.javascriptDialogOpening" for event in self._of_session())

    @property
    def requests(self) -> list[str]:
        """Urls that were asked for, inlined ones aside."""
        sent = [event for event in self._of_session() if event["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def failures(self) -> list[str]:
        """Urls that were asked for in vain."""
        urls = {}
        failed = []
        for event in self._of_session():
            if event["method"] == "Network.requestWillBeSent":
                urls[event["params"]["requestId"]] = event["params"]["request"]["url"]
            elif event["method"] == "Network.loadingFailed":
                failed.append(urls.get(event["params"]["requestId"], ""))
        return failed

    def _of_session(self) -> list[dict[str, Any]]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)
