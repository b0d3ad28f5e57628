"""A browser of Chromium's kind without a window, told what to do through its DevTools protocol, over two pipes."""

import base64
import json
import os
import select
import subprocess
import tempfile
import time

from command_line import BadInput

OPTIONS = ["--headless=new", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars",
           "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
PATIENCE = 60.0  # seconds for any one answer


class Browser:
    """One page of a browser that knows nothing of its user; to be used in a `with`."""

    def __init__(self, program):
        self.home = tempfile.TemporaryDirectory()
        commands, self.to = os.pipe()
        self.answers, answers = os.pipe()

        def as_three_and_four():  # where the browser looks for its pipes; they may be at these numbers already
            ends = [os.dup(end) for end in (commands, answers)]
            for end, place in zip([os.dup(end) if end < 5 else end for end in ends], (3, 4)):
                os.dup2(end, place)

        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [program, *OPTIONS, *root, f"--user-data-dir={self.home.name}", "about:blank"], close_fds=False,
            preexec_fn=as_three_and_four, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.rest, self.number, self.session, self.events = b"", 0, None, []

    def __enter__(self):
        try:
            self.attach()
        except BaseException:
            self.__exit__()
            raise
        return self

    def attach(self):
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.answers)
        self.home.cleanup()

    def message(self):
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self.answers, 1 << 20) if ready else b""
            if not part:
                raise BadInput("the browser ended" if ready else f"the browser said nothing for {PATIENCE:.0f} seconds")
            self.rest += part
        one, self.rest = self.rest.split(b"\0", 1)
        return json.loads(one)

    def call(self, method, **parameters):
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        words = json.dumps({"id": self.number, "method": method, "params": parameters} | session).encode() + b"\0"
        try:
            while words:
                words = words[os.write(self.to, words):]
        except BrokenPipeError:
            raise BadInput("the browser ended") from None
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise BadInput(f"the browser refused {method}: {answer['error'].get('message')}")
        return answer["result"]

    def happened(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def open(self, address, width):
        self.resize(width)
        self.call("Page.navigate", url=address)
        while not self.happened("Page.loadEventFired"):
            self.events.append(self.message())

    def resize(self, width, height=1000):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def value(self, script):
        """What an expression of the page's script is."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise BadInput(f"the page's script failed at {script[:60]!r}: {found['exceptionDetails'].get('text')}")
        return found["result"].get("value")

    def until(self, script, seconds=5.0):
        """Whether an expression has come true before so many seconds were over."""
        end = time.monotonic() + seconds
        while not (come := bool(self.value(script))) and time.monotonic() < end:
            time.sleep(0.05)
        return come

    def point_at(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x, y):
        self.point_at(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path):
        """Of the whole page, as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))
