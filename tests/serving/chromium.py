"""A headless Chromium, spoken to over its debugging pipe: JSON messages that end in a zero byte."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_LONGEST = 120  # seconds


class Page:
    """One page of a browser of its own.

    Attributes:
        urls: of all that it asked for, but for what is written in the page itself.
        complaints: of its console, and exceptions that nobody caught.
    """

    def __init__(self, folder, width=900, height=1000):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def as_three_and_four():
            os.dup2(to_browser, 13)
            os.dup2(from_browser, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        quiet = ("--disable-extensions", "--disable-background-networking", "--disable-component-update")
        self._process = subprocess.Popen(
            [
                FOUND,
                *options,
                *quiet,
                "--remote-debugging-pipe",
                f"--user-data-dir={folder}",
                f"--window-size={width},{height}",
            ],
            preexec_fn=as_three_and_four,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._left, self._session = itertools.count(1), b"", None
        self.urls, self.complaints = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """What a method of the DevTools protocol returns."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != number:
            self._note(answer)
        assert "result" in answer, answer
        return answer["result"]

    def value(self, expression):
        """Of JavaScript; a promise's is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression):
        """Wait for JavaScript to be true."""
        end = time.monotonic() + _LONGEST
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression}; {self.complaints}"
            time.sleep(0.05)

    def click(self, selector):
        """Click the middle of an element, as a mouse does."""
        box = f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])(document.querySelector({selector!r})"
        x, y = self.value(f"{box}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        self._process.kill()
        self._process.wait(_LONGEST)
        os.close(self._read)
        os.close(self._write)

    def _message(self):
        while b"\0" not in self._left:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser has ended"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, about = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent" and not about["request"]["url"].startswith("data:"):
            self.urls.append(about["request"]["url"])
        if method == "Runtime.exceptionThrown" or (method == "Log.entryAdded" and about["entry"]["level"] == "error"):
            self.complaints.append(about)
        if method == "Runtime.consoleAPICalled":
            self.complaints.append(about)
