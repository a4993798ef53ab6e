"""Headless Chromium, driven by its DevTools protocol over two pipes: what a person does with mouse and keys.

Chromium  ->  visitor(address): Visitor, with cookies of its own  ->  click, write, press, wait_for
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
    "--window-size=1400,1000",
)
PATIENCE = 60.0
"""Seconds until something that should come has not come."""

KEYS = {"Enter": ("\r", 13), "Backspace": ("", 8)}  # text and code


class Chromium:
    """A browser process. It reads commands from its file 3 and writes answers and events to its file 4."""

    def __init__(self, folder):
        redirected = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'
        command = ["sh", "-c", redirected, "sh", CHROMIUM, *FLAGS, f"--user-data-dir={folder}"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        self._read = b""
        self._calls = 0
        self.dialogs = []  # messages of those that opened; each is accepted

    def visitor(self, address):
        """Return a new visitor at ``address``, who shares nothing with the others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        visitor = Visitor(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        visitor.call("Page.enable")
        visitor.call("Page.navigate", url=address)
        return visitor

    def call(self, method, session=None, **arguments):
        """Return the answer to a command."""
        self._calls += 1
        number = self._calls
        self._send({"id": number, "method": method, "params": arguments}, session)
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            if message.get("method") == "Page.javascriptDialogOpening":
                self.dialogs.append(message["params"]["message"])
                accept = {"method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                self._calls += 1
                self._send({"id": self._calls, **accept}, message["sessionId"])

    def _send(self, message, session):
        if session is not None:
            message["sessionId"] = session
        self._process.stdin.write(json.dumps(message).encode() + b"\0")

    def _next(self):
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            read = os.read(self._process.stdout.fileno(), 2**16) if ready else b""
            assert read, "Chromium does not answer"
            self._read += read
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def close(self):
        """End the process."""
        try:
            self.call("Browser.close")
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()


class Visitor:
    """A person before a page. What ``evaluate`` and ``wait_for`` take is JavaScript."""

    def __init__(self, browser, session):
        self._browser, self._session = browser, session

    def call(self, method, **arguments):
        return self._browser.call(method, self._session, **arguments)

    def evaluate(self, expression):
        """Return the value of an expression, plain data."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(f"!!({expression})"):
            assert time.monotonic() < end, f"not in {PATIENCE:.0f} s: {expression}\n{self.shown()}"
            time.sleep(0.05)

    def shown(self):
        """Return the text that the page shows."""
        return self.evaluate("document.body.innerText")

    def box(self, element):
        """Return left, top, width and height of an element, in pixels."""
        self.wait_for(element)
        self.evaluate(f"({element}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        return self.evaluate(
            f"(({{x, y, width, height}}) => [x, y, width, height])(({element}).getBoundingClientRect())"
        )

    def click(self, element, count=1):
        """Press the mouse on the middle of an element; twice with ``count=2``, thrice ..."""
        x, y, width, height = self.box(element)
        place = {"x": x + width / 2, "y": y + height / 2, "button": "left"}
        for clicks in range(1, count + 1):
            for event in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=event, clickCount=clicks, **place)

    def write(self, element, text):
        """Write a text into a field in place of what is there."""
        self.click(element, count=3)
        self.evaluate(f"({element}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key):
        """Press a key."""
        text, code = KEYS[key]
        for event in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=event, key=key, code=key, text=text, windowsVirtualKeyCode=code)

    def picture(self, path):
        """Keep what is seen as a PNG."""
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
