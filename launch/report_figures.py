"""The figures of a report as data for the page's script: curves against each axis, and maps of the expert load."""

import math

import numpy as np
from report_findings import load_findings, loss_findings, norm_findings, spread_findings, throughput_findings
from run_curves import (FEWEST, Line, bulk_limits, held_out_sets, heldout_limits, heldout_line, step_line,
                        throughput_limits, throughput_line)
from run_metrics import AXES, axes_of

POINTS = 1000  # of a line: more than a screen shows
NATS = "cross-entropy, nats per token"


def numbers(values, digits=7):
    """As JSON takes them: short, and null for gaps."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in map(float, values)]


def thinned(*columns):
    """Evenly chosen rows of columns of one length; the first and the last stay."""
    places = np.unique(np.linspace(0, len(columns[0]) - 1, min(POINTS, len(columns[0]))).round().astype(int))
    return [np.asarray(column, dtype=float)[places] for column in columns]


def part_of(line):
    """A line against one axis."""
    x, y = thinned(line.x, line.y)
    part = {"x": numbers(x, 9), "y": numbers(y)}
    if line.low is not None:
        low, high = thinned(line.low, line.high)
        kept = np.isfinite(low) & np.isfinite(high)  # a gap would close an area wrongly
        part["band"] = {"x": numbers(x[kept], 9), "low": numbers(low[kept]), "high": numbers(high[kept])}
    if thin := [line.raw] if line.raw else line.runs:
        gap = (math.nan,)  # of one path: where one line ends and another begins
        rows = [thinned(x, y) for x, y in thin]
        part["raw"] = {"x": numbers(np.concatenate([part for x, _ in rows for part in (x, gap)])[:-1], 9),
                       "y": numbers(np.concatenate([part for _, y in rows for part in (y, gap)])[:-1])}
    return part


def curves(groups, axes, line_of, **style):
    """One entry for each group that has such a line."""
    found = []
    for group in groups:
        lines = {axis: line_of(group, axis) for axis in axes}
        if all(line is not None for line in lines.values()):
            parts = {axis: part_of(line) for axis, line in lines.items()}
            of_mean = {"points": False} if len(group.runs) > 1 else {}  # its places are no evaluations
            found.append({"name": group.title.replace("\\$", "$"), "colour": group.colour, "parts": parts} | style
                         | of_mean)
    return found


def figure(name, title, shown, lines, *, unit, limits=None, digits=".4f", findings=(), log=False, level=None):
    return {"id": name, "title": title, "shown": shown, "unit": unit, "lines": lines, "digits": digits, "log": log,
            "level": level, "limits": numbers(limits) if limits else None, "findings": list(findings)}


DASHES = ["solid", "dash", "dot", "dashdot"]  # of held-out sets, as the plotting library calls them


def figure_of_sets(groups, axes):
    """The held-out sets that have names, each by itself; None where there are none."""
    names = held_out_sets(groups)
    lines, drawn, findings = [], [], []
    for i, name in enumerate(names):
        of_set = curves(groups, axes, lambda group, axis, name=name: heldout_line(group, axis, name), points=True,
                        dash=DASHES[i % len(DASHES)])
        lines += [line | {"name": f"{line['name']}: {name}"} for line in of_set]
        drawn += [line for group in groups if (line := heldout_line(group, "step", name))]
        findings += [f"{name}: {words}" for words in loss_findings(groups, axes, "eval_loss", name)]
    return figure("sets", "Held-out loss, set by set", "Colours are runs, dashes are sets.", lines, unit=NATS,
                  limits=heldout_limits(drawn), findings=findings) if names else None


def load_history(run, axes):
    """The spread of the loads over the experts of all layers: bands around their median, and what to see in them."""
    records = [record for record in run.steps if record.get("expert_load")]
    relative = np.array([np.array(r["expert_load"], dtype=float).ravel() * len(r["expert_load"][0]) for r in records])
    lowest, low, middle, high, highest = np.quantile(relative, (0, 0.1, 0.5, 0.9, 1), axis=1)
    places = {axis: run.x(records, axis) for axis in axes}
    lines = []
    for name, bottom, top, fill in (("all experts", lowest, highest, 0.15), ("middle 80 %", low, high, 0.3)):
        bands = {axis: part_of(Line(x, middle, bottom, top))["band"] for axis, x in places.items()}
        lines.append({"name": name, "colour": run.colour, "alone": True, "fill": fill,
                      "parts": {axis: {"x": [], "y": [], "band": band} for axis, band in bands.items()}})
    lines.append({"name": "median", "colour": run.colour,
                  "parts": {axis: part_of(Line(x, middle)) for axis, x in places.items()}})
    return lines, spread_findings(relative)


def load_map(run, name):
    """Mixtures by experts, mean over the last tenth of the run; 1 is a fair share."""
    relative = run.load_at_end()
    return {"id": name, "title": f"Expert load at the end: {run.label}", "findings": load_findings(run),
            "shown": "The share of each expert of each mixture, mean over the last tenth; 1 is a fair share.",
            "map": [numbers(row, 5) for row in relative], "top": max(2.0, min(4.0, float(relative.max())))}


def figures_of(groups, against):
    """What the page's script draws, in its order."""
    runs = [run for group in groups for run in group.runs]
    axes = axes_of(runs)
    single = all(len(group.runs) == 1 for group in groups)
    mean = "" if single else (f" Of several runs: their mean with its 95 % interval; of fewer than {FEWEST} the runs "
                              "themselves, thin, beside their mean.")
    loss = curves(groups, axes, lambda group, axis: step_line(group, axis, "loss"))
    heldout = curves(groups, axes, heldout_line, points=True)
    drawn = [line for group in groups if (line := heldout_line(group, "step"))]
    # At equal tokens runs of one data order have seen the same batches; elsewhere the held-out loss tells more.
    fair = ["tokens"] if heldout else axes
    found = [figure("loss", "Training loss", "Thin: what was logged. Thick: its mean over a fortieth of the run." +
                    mean, loss, unit=NATS, findings=loss_findings(groups, fair, "loss"),
                    limits=bulk_limits([y for group in groups for y in step_line(group, "step", "loss").heights]))]
    if heldout:
        found.append(figure("heldout", "Held-out loss", "Over tokens that were not trained on." + mean, heldout,
                            unit=NATS, limits=heldout_limits(drawn), findings=loss_findings(groups, axes, "eval_loss")))
    if by_set := figure_of_sets(groups, axes):
        found.append(by_set)
    found.append(figure(
        "throughput", "Throughput", "The median of the steps around each point; area: their middle 80 %. Single steps "
        "far above or below the rest move neither." + mean,
        curves(groups, axes, throughput_line), unit="tokens per second, all ranks", limits=throughput_limits(groups),
        digits=".4s", findings=throughput_findings(groups)))
    if any(record.get("grad_norm") is not None for run in runs for record in run.steps):
        found.append(figure("norm", "Gradient norm", "Before clipping; logarithmic.",
                            curves(groups, axes, lambda group, axis: step_line(group, axis, "grad_norm")),
                            unit="L2 norm", digits=".4g", log=True, findings=norm_findings(groups)))
    for i, run in enumerate(run for run in runs if run.loads()):
        found.append(load_map(run, f"load-{i}"))
        lines, findings = load_history(run, axes)
        found.append(figure(f"spread-{i}", f"Spread of the expert load: {run.label}",
                            "Dashed: a fair share. Areas: all experts of all mixtures, and the middle 80 % of them.",
                            lines, unit="load, 1 = fair share", digits=".3f", level=1, findings=findings))
    return {"axes": [[axis, AXES[axis]] for axis in axes], "against": against, "figures": found}
