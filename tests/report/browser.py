"""A headless Chromium, driven over WebDriver's plain HTTP: no package beyond the two programs is needed."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "needs chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)"
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=1100,900", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
]


class Page:
    """One browser window."""

    def __init__(self, base: str) -> None:
        self._base = base

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = Request(self._base + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=90) as answer:
            return json.load(answer)["value"]

    def open(self, file: Path | str) -> None:
        """Open a file, or an address."""
        address = file if isinstance(file, str) else file.resolve().as_uri()
        self.call("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def resize(self, width: int, height: int = 900) -> None:
        """Give the window a size in pixels."""
        self.call("POST", "/window/rect", {"width": width, "height": height})

    def wait_for(self, script: str, seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while not (value := self.run(script)) and time.monotonic() < end:
            time.sleep(0.1)
        return value

    def _pointer(self, *steps: dict[str, Any]) -> None:
        pointer = {
            "type": "pointer",
            "id": "mouse",
            "parameters": {"pointerType": "mouse"},
            "actions": list(steps),
        }
        self.call("POST", "/actions", {"actions": [pointer]})

    def move(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window, over some way, as a hand would."""
        near = {"type": "pointerMove", "duration": 50, "x": round(x) - 3, "y": round(y) - 3}
        self._pointer(near, {**near, "x": round(x), "y": round(y)})

    def click(self, x: float, y: float) -> None:
        self.move(x, y)
        self._pointer({"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

    def console(self) -> list[str]:
        entries = self.call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start a driver and a browser with an empty profile in `folder`; both are gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert DRIVER is not None
    process = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        driver = Page(f"http://127.0.0.1:{port}")
        until_answers(f"http://127.0.0.1:{port}/status")
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = driver.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        page = Page(f"http://127.0.0.1:{port}/session/{session}")
        try:
            yield page
        finally:
            page.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(timeout=30)


def until_answers(address: str, seconds: float = 30) -> None:
    """Wait until a server answers.

    Raises:
        OSError: It does not.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            with urlopen(address, timeout=10):
                return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)
