#!/usr/bin/env python3
"""The page of `upmoe report` in a real browser without a window, as its reader would use it.

    tests/report_in_browser.py [--browser PROGRAM] [--pictures FOLDER] [PAGE]

PAGE: a report.html (default: runs/quickstart/report/report.html, of launch/quickstart.sh). Opens it and looks for
errors in the console and for requests to any host; draws the curves against each axis; points at every curve and reads
values; hides lines by their names; looks whether anything covers a curve, sticks out of the window or is drawn twice,
at 400, 900 and 1600 pixels. --pictures keeps the page at these widths as PNG, to be looked at: what a picture shows, no
check knows. Needs the package of tests/browser_requirements.txt, and Chromium or a browser of its kind with its driver
(Debian: apt-get install chromium chromium-driver); not part of the test suite. Exit status 0 only if nothing is wrong.
"""

import argparse
import base64
import json
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "launch"))
from command_line import BadInput, BadUsage, ToolParser, display, run_tool  # noqa: E402

try:  # what --help does without
    from selenium.common.exceptions import TimeoutException, WebDriverException
    from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait
    MISSING = None
except ImportError as missing:
    MISSING = missing

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ("--headless=new", "--hide-scrollbars", "--disable-component-update", "--disable-dev-shm-usage")
WIDTHS = (400, 900, 1600)
# Of a figure: boxes of its parts in the window, of what is there; what it tells of the place that is pointed at;
# whether a line of it is hidden.
BOXES = """(() => { const found = {};
for (const [name, place] of [["curves", ".nsewdrag"], ["buttons", ".modebar"], ["names", ".legend"],
                             ["axis", ".xtitle"], ["ticks", ".xaxislayer-above"]]) {
  const box = arguments[0].querySelector(place)?.getBoundingClientRect();
  if (box && box.width && box.height) found[name] = [box.left, box.top, box.right, box.bottom];
} return found; })()"""
TOLD = "[...arguments[0].querySelectorAll('.hoverlayer text')].map((t) => t.textContent)"
HIDDEN = "arguments[0].data.some((t) => t.visible === 'legendonly')"
OUTSIDE = """[...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest(".wide, pre, script")).slice(0, 3).map((e) => e.tagName.toLowerCase())"""


def start(program, driver):
    """A browser that knows nothing of its user and keeps what it logs."""
    options = ChromeOptions()
    options.binary_location = program
    for option in OPTIONS + (("--no-sandbox",) if os.geteuid() == 0 else ()):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["no_proxy"] = "localhost"  # where the driver is
    return Chrome(options, ChromeService(driver))  # without a driver's path selenium would download one


def resize(browser, width):
    """Also to less than a window's least width."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False})


def whole_page(browser):
    """As PNG."""
    return base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])


def ask(browser, expression, *arguments):
    """What an expression of the page's script is."""
    return browser.execute_script(f"return {expression}", *arguments)


def until(browser, come):
    """Whether something has come before 5 seconds were over."""
    try:
        return bool(WebDriverWait(browser, 5.0, 0.05).until(lambda _: come()))
    except TimeoutException:
        return False


def show(browser, element):
    """Below what stays at the top of the window."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)


def part(of, place):
    return of.find_element(By.CSS_SELECTOR, place)


def press(browser, axis):
    part(browser, f"button[data-axis={axis}]").click()


def covers(one, other):
    """By more than a pixel's rounding."""
    return all(min(one[2 + i], other[2 + i]) - max(one[i], other[i]) > 1 for i in (0, 1))


def requests(browser):
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            address = event["params"]["request"]["url"]
            if not address.startswith(("data:", "blob:")) and address != event["params"]["documentURL"]:
                yield f"asked for {address[:120]}"


def places(browser, figures, width):
    """Nothing sticks out, and of a figure's parts none lies on another."""
    for tag in ask(browser, OUTSIDE):
        yield f"a {tag} sticks out of the window"
    if ask(browser, "document.documentElement.scrollWidth") > width:
        yield "the page is wider than the window"
    for name, figure in figures.items():
        found = ask(browser, BOXES, figure)
        if "curves" not in found:
            yield f"{name} is not drawn"
        parts = list(found.items())
        for i, (one, box) in enumerate(parts):
            for other, its in parts[i + 1:]:
                if covers(box, its):
                    yield f"{name}: its {one} and its {other} lie on each other"


def axes(browser, figures, lines):
    """Each button draws the curves anew against what it says."""
    seen = {}
    for axis, words in lines["axes"]:
        press(browser, axis)
        pressed = ask(browser, "[...document.querySelectorAll('button[aria-pressed=true]')].map((b) => b.dataset.axis)")
        if pressed != [axis]:
            yield f"the button of {axis} was pressed, and these are: {pressed}"
        for name, figure in figures.items():
            title = "arguments[0].querySelector('.xtitle')?.textContent"
            if not until(browser, lambda: ask(browser, title, figure) == words):
                yield f"{name} does not say that it is against {words}"
            drawn = ask(browser, "[...arguments[0].querySelectorAll('.xtick')].map((e) => e.textContent).join()",
                        figure)
            if seen.setdefault((name, drawn), axis) != axis:
                yield f"{name} has the same places against {axis} as against {seen[name, drawn]}"


def point_at(browser, figure, share):
    """What a figure tells of a place of its curves, so far from the left, to a hand that trembles."""
    curves, hand = part(figure, ".nsewdrag"), ActionChains(browser, duration=0)
    for i in range(3):
        hand.move_to_element_with_offset(curves, (share - 0.5) * curves.size["width"] + i, 0).pause(0.1)
    hand.perform()
    return ask(browser, TOLD, figure)


def values(browser, figures):
    """Pointing at a picture shows values, with whole names."""
    for name, figure in figures.items():
        show(browser, figure)
        for share in (0.15, 0.85):
            until(browser, lambda: point_at(browser, figure, share))
            found = ask(browser, TOLD, figure)
            if not any(":" in words for words in found) and len(found) < 2:  # a single line's name is left out
                yield f"{name}: pointing at it tells no value, but {found}"
            if any("... :" in words for words in found):
                yield f"{name}: names are cut short: {found}"


def names(browser, figures, buttons):
    """A click on a name hides its line, also against another axis, and a second one brings it back."""
    for name, figure in figures.items():
        for gone in (True, False):
            its = part(figure, ".legendtoggle")
            show(browser, its)
            its.click()
            if not until(browser, lambda: ask(browser, HIDDEN, figure) == gone):
                yield f"{name}: a click on a name does not {'hide' if gone else 'bring back'} its line"
                break
            for axis in (buttons[-1], buttons[0]) if gone else ():
                press(browser, axis)
                if not ask(browser, HIDDEN, figure):
                    yield f"{name}: a hidden line is back against {axis}"
            time.sleep(0.4)  # two clicks at once are a double click


def once(browser, figures):
    """No picture is there twice, and each can be saved."""
    seen = {}
    for name, figure in figures.items():
        picture = ask(browser, "Plotly.toImage(arguments[0], {format: 'png', width: 600, height: 400})", figure)
        if not str(picture).startswith("data:image/png;base64,"):
            yield f"{name} cannot be saved as a picture"
        if seen.setdefault(picture, name) != name:
            yield f"{name} is the same picture as {seen[picture]}"


def check(browser, page, pictures):
    """(what was tried, what is wrong)."""
    resize(browser, WIDTHS[1])
    browser.get(page.resolve().as_uri())
    found = ask(browser, "document.getElementById('figures')?.textContent")
    if not found or not until(browser, lambda: ask(browser, "document.querySelectorAll('.main-svg').length")):
        raise BadInput(f"{display(page)}: no page of `upmoe report`, or nothing is drawn in it")
    data = json.loads(found)
    figures = {figure["id"]: browser.find_element(By.ID, figure["id"]) for figure in data["figures"]}
    lines = {figure["id"]: figures[figure["id"]] for figure in data["figures"] if figure.get("lines")}
    buttons = [axis for axis, _ in data["axes"]]
    for width in WIDTHS:
        resize(browser, width)
        time.sleep(1.0)  # the pictures follow the window
        yield f"at {width} pixels", list(places(browser, figures, width))
        if pictures:
            (pictures / f"report_{width}.png").write_bytes(whole_page(browser))
    yield "axes", list(axes(browser, lines, data))
    for axis in buttons:
        press(browser, axis)
        yield f"values against {axis}", list(values(browser, lines))
    yield "values of maps", list(values(browser, {name: its for name, its in figures.items() if name not in lines}))
    yield "names", list(names(browser, lines, buttons))
    yield "pictures", list(once(browser, figures))
    yield "console", [f"{entry['source']}: {entry['message']}" for entry in browser.get_log("browser")]
    yield "requests", list(requests(browser))


def arguments():
    """(page, folder for pictures, the browser's program, its driver's), of what is there."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, metavar="PAGE",
                        default=ROOT / "runs" / "quickstart" / "report" / "report.html")
    parser.add_argument("--browser", help=f"its program (default: the first there is of {', '.join(PROGRAMS)})")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="keep what the page looks like as PNG there")
    args = parser.parse_args()
    if not args.page.is_file():
        raise BadInput(f"{display(args.page)}: not found; give the report.html of `upmoe report`, or run "
                       "launch/quickstart.sh first")
    program = next(filter(None, map(shutil.which, [args.browser] if args.browser else PROGRAMS)), None)
    if not program:
        raise BadUsage(f"{args.browser or 'no browser of ' + ', '.join(PROGRAMS)}: not found; install one (Debian: "
                       "apt-get install chromium chromium-driver) or name its program with --browser")
    driver = shutil.which("chromedriver")
    if not driver:
        raise BadUsage("chromedriver: not found; install the browser's (Debian: apt-get install chromium-driver), or "
                       "put its folder into PATH")
    if MISSING:
        raise BadUsage(f"{sys.executable} cannot import {MISSING.name}; tests/browser_requirements.txt has the package "
                       "that is needed (docs/running.md)")
    return args.page, args.pictures, program, driver


def main():
    page, pictures, program, driver = arguments()
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    wrong = 0
    try:
        with start(program, driver) as browser:
            for tried, problems in check(browser, page, pictures):
                print(f"{tried:24} {'FAILED' if problems else 'as it should'}", *problems,
                      sep="\n  " if problems else "", flush=True)
                wrong += len(problems)
    except WebDriverException as e:
        raise BadInput(f"{display(page)}: {program} and {driver}: {' '.join(str(e.msg).split())}") from None
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_tool("report_in_browser", main))
