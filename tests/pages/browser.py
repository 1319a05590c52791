"""A headless Chromium, driven over its debugging pipe (Chrome DevTools Protocol): no driver, no further package."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _pipe() -> list[int]:
    """A pipe whose descriptors are above those that Chromium takes."""
    low = os.pipe()
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in low]
    for descriptor in low:
        os.close(descriptor)
    return high


class Browser:
    """One page. Commands are answered in order; events are kept in `events`."""

    def __init__(self):
        self._profile = tempfile.mkdtemp(prefix="saejax-chromium-")
        (to_read, self._write), (self._read, to_write) = _pipe(), _pipe()
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={self._profile}", "about:blank"]
        nothing = os.open(os.devnull, os.O_RDWR)
        places = [(os.POSIX_SPAWN_DUP2, here, there) for here, there in ((nothing, 1), (nothing, 2), (to_read, 3), (to_write, 4))]
        # Not subprocess: it would fork, which a process with JAX's threads should not; Chromium wants descriptors 3 and 4.
        self._process = os.posix_spawn(CHROMIUM, [CHROMIUM, *arguments], os.environ, file_actions=places)
        for descriptor in (nothing, to_read, to_write):
            os.close(descriptor)
        self._buffer, self._number, self.events = b"", 0, []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, timeout: float = 60, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            answer = self._next(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _next(self, until: float) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            assert ready, "chromium did not answer"
            data = os.read(self._read, 1 << 20)
            assert data, "chromium ended"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path, fragment: str = "") -> None:
        self.call("Page.navigate", url=Path(page).absolute().as_uri() + fragment)

    def js(self, expression: str):
        """The value of an expression; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 20):
        """Waits until a JavaScript expression is true; returns its value."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            value = self.js(condition)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}; the page says: {self.js('document.body.innerText')[:500]}")

    def place(self, selector: str) -> tuple[float, float]:
        """Middle of an element, scrolled into view; when what scrolling sets off has happened."""
        return tuple(self.js(f"(async () => {{ const e = document.querySelector({selector!r}); "
                             "e.scrollIntoView({block: 'center'}); "
                             "for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame); "
                             "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"))

    def hover(self, selector: str) -> None:
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        self.click(selector)
        self.call("Input.insertText", text=text)

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, file: Path, *, full: bool = False) -> None:
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        Path(file).write_bytes(base64.b64decode(picture["data"]))

    def troubles(self) -> list[str]:
        """Errors that the pages since the last call wrote to the console, and requests that left the disk."""
        events, self.events = self.events, []
        bad = [json.dumps(e) for e in events if e.get("method") == "Runtime.exceptionThrown"
               or (e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] == "error")]
        asked = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
        return bad + [url for url in asked if not url.startswith(("file:", "about:", "data:"))]

    def close(self) -> None:
        os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)
        os.close(self._write), os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)
