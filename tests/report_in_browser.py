#!/usr/bin/env python3
"""The page of `upmoe report` in a real browser without a window, as its reader would use it.

    tests/report_in_browser.py [--browser PROGRAM] [--pictures FOLDER] [PAGE]

PAGE: a report.html (default: runs/quickstart/report/report.html, of launch/quickstart.sh). Opens it and looks for
errors in the console and for requests to any host; draws the curves against each axis; points at every curve and reads
values; hides lines by their names; looks whether anything covers a curve, sticks out of the window or is drawn twice,
at 400, 900 and 1600 pixels. --pictures keeps the page at these widths as PNG, to be looked at: what a picture shows, no
check knows. Needs Chromium or a browser of its kind (Debian: apt-get install chromium); not part of the test suite.
Exit status 0 only if nothing is wrong.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests" / "support")]
from browser import Browser  # noqa: E402
from command_line import BadInput, BadUsage, display, run_tool  # noqa: E402

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (400, 900, 1600)
# Boxes of a figure's parts in the window: of what is there.
BOXES = """(() => { const found = {}, root = document.getElementById(ID);
for (const [name, place] of [["curves", ".nsewdrag"], ["buttons", ".modebar"], ["names", ".legend"],
                             ["axis", ".xtitle"], ["ticks", ".xaxislayer-above"]]) {
  const box = root.querySelector(place)?.getBoundingClientRect();
  if (box && box.width && box.height) found[name] = [box.left, box.top, box.right, box.bottom];
} return found; })()"""
OUTSIDE = """[...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest(".wide, pre, script")).slice(0, 3).map((e) => e.tagName.toLowerCase())"""


def of(figure, script):
    return script.replace("ID", json.dumps(figure))


def boxes(browser, figure):
    browser.value(of(figure, 'document.getElementById(ID).scrollIntoView({block: "center", behavior: "instant"})'))
    return browser.value(of(figure, BOXES))


def covers(one, other):
    """By more than a pixel's rounding."""
    return all(min(one[2 + i], other[2 + i]) - max(one[i], other[i]) > 1 for i in (0, 1))


def silence(browser):
    for thrown in browser.happened("Runtime.exceptionThrown"):
        details = thrown["exceptionDetails"]
        yield details.get("exception", {}).get("description") or details.get("text")
    for said in browser.happened("Runtime.consoleAPICalled"):
        yield f"console: {[part.get('value') for part in said['args']]}"
    for entry in browser.happened("Log.entryAdded"):
        yield f"{entry['entry']['source']}: {entry['entry']['text']}"


def requests(browser):
    for sent in browser.happened("Network.requestWillBeSent"):
        address = sent["request"]["url"]
        if not address.startswith(("data:", "blob:")) and address != sent["documentURL"]:
            yield f"asked for {address[:120]}"


def places(browser, figures, width):
    """Nothing sticks out, and of a figure's parts none lies on another."""
    for tag in browser.value(OUTSIDE):
        yield f"a {tag} sticks out of the window"
    if browser.value("document.documentElement.scrollWidth") > width:
        yield "the page is wider than the window"
    for figure in figures:
        found = boxes(browser, figure)
        if "curves" not in found:
            yield f"{figure} is not drawn"
        parts = list(found.items())
        for i, (name, box) in enumerate(parts):
            for other, its in parts[i + 1:]:
                if covers(box, its):
                    yield f"{figure}: its {name} and its {other} lie on each other"


def axes(browser, figures, lines):
    """Each button draws the curves anew against what it says."""
    seen = {}
    for axis, words in lines["axes"]:
        browser.value(f"document.querySelector('button[data-axis={axis}]').click()")
        pressed = browser.value("[...document.querySelectorAll('button[aria-pressed=true]')]"
                                ".map((b) => b.dataset.axis)")
        if pressed != [axis]:
            yield f"the button of {axis} was pressed, and these are: {pressed}"
        for figure in figures:
            if not browser.until(of(figure, f"document.querySelector('#' + ID + ' .xtitle')?.textContent === "
                                            f"{json.dumps(words)}")):
                yield f"{figure} does not say that it is against {words}"
            drawn = browser.value(of(figure, "[...document.querySelectorAll('#' + ID + ' .xtick')]"
                                             ".map((e) => e.textContent).join()"))
            if seen.setdefault((figure, drawn), axis) != axis:
                yield f"{figure} has the same places against {axis} as against {seen[figure, drawn]}"


def values(browser, figures):
    """Pointing at a picture shows values, with whole names."""
    for figure in figures:
        left, top, right, bottom = boxes(browser, figure)["curves"]
        told = of(figure, "[...document.querySelectorAll('#' + ID + ' .hoverlayer text')].map((t) => t.textContent)")
        for place in (0.15, 0.85):
            found, end = [], time.monotonic() + 5.0
            while not found and time.monotonic() < end:  # a hand that trembles
                for i in range(3):
                    browser.point_at(left + place * (right - left) + i, (top + bottom) / 2)
                    time.sleep(0.1)
                found = browser.value(told)
            if not any(":" in words for words in found) and len(found) < 2:  # a single line's name is left out
                yield f"{figure}: pointing at it tells no value, but {found}"
            if any("... :" in words for words in found):
                yield f"{figure}: names are cut short: {found}"
    browser.point_at(1, 1)


def names(browser, figures, buttons):
    """A click on a name hides its line, also against another axis, and a second one brings it back."""
    hidden = "document.getElementById(ID).data.some((t) => t.visible === 'legendonly')"
    for figure in figures:
        for gone in (True, False):
            boxes(browser, figure)
            x, y = browser.value(of(figure, "(() => { const b = document.querySelector('#' + ID + ' .legendtoggle')"
                                            ".getBoundingClientRect(); "
                                            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"))
            browser.click(x, y)
            if not browser.until(of(figure, hidden if gone else f"!{hidden}")):
                yield f"{figure}: a click on a name does not {'hide' if gone else 'bring back'} its line"
                break
            for axis in (buttons[-1], buttons[0]) if gone else ():
                browser.value(f"document.querySelector('button[data-axis={axis}]').click()")
                if not browser.value(of(figure, hidden)):
                    yield f"{figure}: a hidden line is back against {axis}"
            time.sleep(0.4)  # two clicks at once are a double click


def once(browser, figures):
    """No picture is there twice, and each can be saved."""
    seen = {}
    for figure in figures:
        picture = browser.value(of(figure, "Plotly.toImage(ID, {format: 'png', width: 600, height: 400})"))
        if not str(picture).startswith("data:image/png;base64,"):
            yield f"{figure} cannot be saved as a picture"
        if seen.setdefault(picture, figure) != figure:
            yield f"{figure} is the same picture as {seen[picture]}"


def check(browser, page, pictures):
    """(what was tried, what is wrong)."""
    browser.open(page.resolve().as_uri(), WIDTHS[1])
    found = browser.value("document.getElementById('figures')?.textContent")
    if not found or not browser.until("document.querySelectorAll('.main-svg').length"):
        raise BadInput(f"{display(page)}: no page of `upmoe report`, or nothing is drawn in it")
    data = json.loads(found)
    figures = [figure["id"] for figure in data["figures"]]
    lines = [figure["id"] for figure in data["figures"] if figure.get("lines")]
    buttons = [axis for axis, _ in data["axes"]]
    for width in WIDTHS:
        browser.resize(width)
        time.sleep(1.0)  # the pictures follow the window
        yield f"at {width} pixels", list(places(browser, figures, width))
        if pictures:
            browser.value("scrollTo(0, 0)")
            browser.picture(pictures / f"report_{width}.png")
    yield "axes", list(axes(browser, lines, data))
    for axis in buttons:
        browser.value(f"document.querySelector('button[data-axis={axis}]').click()")
        yield f"values against {axis}", list(values(browser, lines))
    yield "values of maps", list(values(browser, [figure for figure in figures if figure not in lines]))
    yield "names", list(names(browser, lines, buttons))
    yield "pictures", list(once(browser, figures))
    yield "console", list(silence(browser))
    yield "requests", list(requests(browser))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, metavar="PAGE",
                        default=ROOT / "runs" / "quickstart" / "report" / "report.html")
    parser.add_argument("--browser", help=f"its program (default: the first there is of {', '.join(PROGRAMS)})")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="keep what the page looks like as PNG there")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, [args.browser] if args.browser else PROGRAMS)), None)
    if not program:
        raise BadUsage(f"{args.browser or 'no browser of ' + ', '.join(PROGRAMS)}: not found; install one (Debian: "
                       "apt-get install chromium) or name its program with --browser")
    if not args.page.is_file():
        raise BadInput(f"{display(args.page)}: not found; give the report.html of `upmoe report`, or run "
                       "launch/quickstart.sh first")
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with Browser(program) as browser:
        for tried, problems in check(browser, args.page, args.pictures):
            print(f"{tried:24} {'FAILED' if problems else 'as it should'}", *problems, sep="\n  " if problems else "",
                  flush=True)
            wrong += len(problems)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_tool("report_in_browser", main))
