"""The page of a report: one file that reads nothing else, with the plotting library in it."""

import html
import json
from pathlib import Path
from statistics import median

import numpy as np
from command_line import display
from plotly.offline import get_plotlyjs
from report_figures import figures_of
from report_findings import is_disturbed
from run_curves import short
from run_facts import differences, facts_of, read_facts, recipe_of
from run_metrics import smooth, values
from whole_file import write_whole

SCRIPT = Path(__file__).resolve().parent / "report_page.js"
# Whatever a library would like to fetch, the browser refuses; it may run, draw and save a picture.
POLICY = ("default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
          "img-src data: blob:; font-src data:")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 75rem; margin: 2rem auto }
body { padding: 0 1rem } h1 { overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .9rem; text-align: right }
td, th { vertical-align: top }
td:first-child, th:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
tr + tr td, tr + tr th { border-top: 1px solid #e6e6e6 } .wide { overflow-x: auto }
.facts { table-layout: fixed; width: 100% } .facts th { width: 6.5rem; font-weight: 600 }
.facts td, .words td, .words th { text-align: left; overflow-wrap: anywhere } .words td { min-width: 7rem }
.words td:first-child { overflow-wrap: normal }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto } summary { cursor: pointer; margin: .5rem 0 }
summary { overflow-wrap: anywhere }
nav { position: sticky; top: 0; z-index: 5; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ddd }
button { font: inherit; padding: .2rem .9rem; border: 1px solid #888; border-radius: 1rem; background: #fff }
button { cursor: pointer; color: inherit }
button[aria-pressed=true] { background: #31688e; color: #fff; border-color: #31688e } figure { margin: 0 0 2.5rem }
figcaption { color: #555 } .see { border-left: 4px solid #c9a227; padding-left: 1.8rem; margin: .6rem 0 }
@media (max-width: 40rem) { .facts th, .facts td { display: block; width: auto; padding: .3rem 0 }
  .facts th + td { border-top: 0; padding-top: 0 } }
"""


def row(cells, tag="td"):
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def summary_rows(runs):
    for run in runs:
        last = run.steps[-1]
        mfu = [r["mfu"] for r in run.steps if r.get("mfu") is not None]
        rate = short(median(r["tokens_per_s"] for r in run.steps)) + (", disturbed" if is_disturbed(run) else "")
        gaps = np.diff([r["step"] for r in run.steps], prepend=0)
        yield [run.label, f"{last['step']:,}", short(last["tokens"]),
               f"{smooth(values(run.steps, 'loss'), len(run.steps) // 40)[-1]:.4f}",
               f"{values(run.evals, 'eval_loss')[-1]:.4f}" if run.evals else "-",
               rate, f"{100 * median(mfu):.1f} %" if mfu else "-",
               f"{sum(r['seconds'] * gap for r, gap in zip(run.steps, gaps)):,.0f} s"]


def summary_table(runs):
    head = ["run", "steps", "tokens", "training loss", "held-out loss", "tokens/s, median", "MFU, median",
            "time in steps"]
    return (f'<div class="wide"><table><thead>{row(head, "th")}</thead>'
            f'<tbody>{"".join(map(row, summary_rows(runs)))}</tbody></table></div>')


def figure_html(figure):
    seen = "".join(f"<li>{html.escape(words)}</li>" for words in figure["findings"])
    return (f'<figure><h3>{html.escape(figure["title"])}</h3>'
            f'<figcaption>{html.escape(figure["shown"])}</figcaption>'
            + (f'<ul class="see">{seen}</ul>' if seen else "") + f'<div id="{figure["id"]}"></div></figure>')


def axis_choice(axes):
    buttons = " ".join(f'<button type="button" data-axis="{axis}">{html.escape(words)}</button>'
                       for axis, words in axes)
    return (f"<nav>Curves against: {buttons}</nav><p>Point at a curve to read values off all of them; drag to look "
            "closer, double-click to go back, and once more to see all there is, also what lies above the picture; "
            "click a name to hide its line.</p>")


def facts_html(run, facts, opened):
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{'<br>'.join(html.escape(line) for line in lines)}</td></tr>"
                   for name, lines in facts_of(facts))
    recipe = recipe_of(facts)
    if recipe:
        loss = "" if recipe["loss"] is None else f"; its loss at step 0: {recipe['loss']:.4f}"
        rows += (f"<tr><th>recipe</th><td>{html.escape(recipe['report'])}, from "
                 f"{html.escape(', '.join(recipe['files']))}{loss}<pre>{html.escape(recipe['text'])}</pre></td></tr>")
    return (f"<details{' open' if opened else ''}><summary><b>{html.escape(run.label)}</b> "
            f'{html.escape(display(run.path))}</summary><table class="facts">{rows}</table></details>')


def differences_html(runs, all_facts):
    if len(runs) < 2:
        return ""
    rows = differences(all_facts)
    if not rows:
        return "<p>Their configurations are the same.</p>"
    head = ["key", *(run.label for run in runs)]
    return ('<h2>What differs in their configurations</h2><div class="wide"><table class="words">'
            f'<thead>{row(head, "th")}</thead><tbody>{"".join(row([key, *found]) for key, found in rows)}</tbody>'
            "</table></div>")


def configurations_html(runs, all_facts):
    return "".join(f"<details><summary>{html.escape(display(run.path / 'config.yaml'))}</summary>"
                   f"<pre>{html.escape(facts.config_text)}</pre></details>"
                   for run, facts in zip(runs, all_facts) if facts.config_text) or "<p>none found</p>"


def script_of(text):
    """What stands between script tags and does not end them."""
    if "</script" in text.lower():
        raise ValueError("a script that would end its own tag")
    return f"<script>{text}</script>"


def write_page(folder, groups, against, pictures):
    runs = [run for group in groups for run in group.runs]
    all_facts = [read_facts(run.path) for run in runs]
    figures = figures_of(groups, against)
    data = json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = "upmoe: " + " \u00b7 ".join(dict.fromkeys(group.label for group in groups))
    few = len(runs) <= 3
    page = folder / "report.html"
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{summary_table(runs)}
<h2>Curves</h2>
<noscript><p>The curves below are drawn by a script in this page, which this browser does not run.</p></noscript>
{axis_choice(figures["axes"])}
{"".join(map(figure_html, figures["figures"]))}
<p>As PNG files beside this page: {html.escape(", ".join(pictures))}.</p>
<h2>What the runs were</h2>
{"".join(facts_html(run, facts, few) for run, facts in zip(runs, all_facts))}
{differences_html(runs, all_facts)}
<h2>Configurations</h2>
{configurations_html(runs, all_facts)}
<script type="application/json" id="figures">{data}</script>
{script_of(get_plotlyjs())}
{script_of(SCRIPT.read_text(encoding="utf-8"))}
</body></html>
"""
    write_whole(page, text)
    return page
