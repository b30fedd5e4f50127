"""A real browser without a window, steered over the Chrome DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from websockets.sync.client import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from websockets.sync.client import ClientConnection

CHROMIUM: Final = shutil.which("chromium") or shutil.which("google-chrome")
WAIT_S: Final = 60.0
_FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"),
    # It shall ask nobody for anything but the pages.
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Page:
    """A tab.

    Attributes:
        problems: What its console was told as an error, exceptions of its scripts, and requests that failed.
        requests: The addresses that it asked for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._loaded = False
        self.problems: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, address: str) -> None:
        """Go there; returns when all of it is loaded."""
        self._loaded = False
        self._call("Page.navigate", url=address)
        until_s = time.monotonic() + WAIT_S
        while not self._loaded:
            self._take(until_s)

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is awaited.

        Raises:
            AssertionError: It has thrown.
        """
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression is true."""
        waiting = (
            "new Promise((done, failed) => {{ const until = Date.now() + {ms}; const look = () => ({true}) ? done() "
            ": Date.now() > until ? failed(new Error('in vain')) : setTimeout(look, 20); look(); }})"
        )
        self.run(waiting.format(ms=WAIT_S * 1000, true=script))

    def picture(self, path: Path) -> None:
        """Write what is seen to a PNG file."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        until_s = time.monotonic() + WAIT_S
        while True:
            message = self._take(until_s)
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _take(self, until_s: float) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(
            self._socket.recv(timeout=max(0.0, until_s - time.monotonic()))
        )
        told = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.problems.append(str(told["exceptionDetails"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.problems.append(str(told["entry"]))
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
            case "Network.responseReceived" if told["response"]["status"] >= 400:
                self.problems.append(str(told["response"]))
            case "Network.loadingFailed":
                self.problems.append(str(told))
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """An empty tab of a browser with a profile of its own, which ends with the context."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            # It says at which port it listens.
            line = next(line for line in process.stderr if line.startswith("DevTools listening"))
            port = line.rpartition("ws://")[2].split("/")[0].rpartition(":")[2]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=WAIT_S) as answer:
                (tab,) = (tab for tab in json.load(answer) if tab["type"] == "page")
            with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
