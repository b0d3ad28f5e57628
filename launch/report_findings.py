"""What a reader should see in the curves of runs, in sentences: computed, not guessed."""

import numpy as np
from run_curves import heldout_line, median_rate, short, step_line
from run_metrics import AXES, values

SLOW = 1.5         # of the median: a step that something held up
DISTURBED = 0.05   # share of such steps from which on it is said
LEVEL = 0.002      # nats: a difference below which two ends are called equal


def end_of(line):
    """The last finite point of a line; None without one."""
    good = np.flatnonzero(np.isfinite(line.y))
    return (float(line.x[good[-1]]), float(line.y[good[-1]])) if good.size else None


def value_at(line, x):
    good = np.isfinite(line.y)
    return float(np.interp(x, line.x[good], line.y[good]))


def compared(lines, axis):
    """The losses of several lines at the last place of the axis that all of them reach; "" where there is none."""
    known = [(label, line, end_of(line)) for label, line in lines]
    known = [(label, line, end) for label, line, end in known if end]
    if len(known) < 2:
        return ""
    x = min(end[0] for _, _, end in known)
    if any(line.x[np.isfinite(line.y)][0] > x for _, line, _ in known):
        return ""  # one begins where another has ended
    losses = sorted((value_at(line, x), label) for label, line, _ in known)
    best = losses[0][0]
    rest = "; ".join(f"{label} {loss:.4f} ({loss - best:.4f} above)" if loss - best >= LEVEL else
                     f"{label} {loss:.4f} (equal within {LEVEL:g})" for loss, label in losses[1:])
    going_on = [label for label, _, end in known if end[0] > 1.01 * x]
    return (f"At equal {AXES[axis]} ({short(x)}), lowest first: {losses[0][1]} {best:.4f}; {rest}."
            + (f" Not at its end there, where a learning rate that falls brings the loss down: {', '.join(going_on)}."
               if going_on else ""))


def course(label, line, rises):
    """How one line went; `rises`: it is no noise where it has left its lowest value behind."""
    end, good = end_of(line), np.isfinite(line.y)
    if end is None:
        return f"{label}: no finite loss."
    y = line.y[good]
    words = f"{label}: from {y[0]:.4f} to {y[-1]:.4f}"
    lowest = int(np.argmin(y))
    if rises and y[-1] - y[lowest] > max(5 * LEVEL, 0.005 * y[lowest]):
        words += f"; its lowest was {y[lowest]:.4f} at {short(line.x[good][lowest])}, and it has risen since"
    elif len(y) >= 20:
        tenth = len(y) // 10
        change = float(np.mean(y[-tenth:]) - np.mean(y[-2 * tenth:-tenth]))
        words += f"; its last tenth lies {abs(change):.4f} {'below' if change < 0 else 'above'} the tenth before it"
    return words + "."


def loss_findings(groups, axes, kind, name=None):
    """kind: "loss" for what each step logged, "eval_loss" for the held-out loss, of the set of that name or of all."""
    def line_of(group, axis):
        return heldout_line(group, axis, name) if kind == "eval_loss" else step_line(group, axis, kind)

    found = [course(group.label, line, kind == "eval_loss") for group in groups if (line := line_of(group, "tokens"))]
    if not found:
        return ["These runs have no held-out evaluation: data.valid was not given."]
    # Runs that go on from another's end are compared where they have gone to, not where that one has ended.
    rivals = [group for group in groups if all(run.starts for run in group.runs)] or groups
    disturbed = [run.label for group in rivals for run in group.runs if is_disturbed(run)]
    for axis in (axis for axis in axes if axis != "step"):
        words = compared([(group.label, line) for group in rivals if (line := line_of(group, axis))], axis)
        if words and axis == "seconds" and disturbed:
            words += f" Their seconds are the machine's, which was disturbed: {', '.join(disturbed)}."
        found.append(words)
    skipped = {run.label: sum(bool(r.get("skipped")) for r in run.steps) for group in groups for run in group.runs}
    if kind == "loss":
        found += [f"{label}: {n} steps were not finite and changed nothing." for label, n in skipped.items() if n]
    return [words for words in found if words]


def slow_steps(run):
    """Share of the logged steps that took more than SLOW medians, and the seconds that all steps lost to the median."""
    seconds = values(run.steps, "seconds")
    seconds = seconds[np.isfinite(seconds)]
    usual = float(np.median(seconds)) if seconds.size else 0.0
    if usual <= 0:
        return 0.0, 0.0
    return float(np.mean(seconds > SLOW * usual)), float(np.maximum(seconds - usual, 0).sum() / seconds.sum())


def is_disturbed(run):
    return slow_steps(run)[0] > DISTURBED


def throughput_findings(groups):
    found = []
    for group in groups:
        rates = np.concatenate([values(run.steps, "tokens_per_s") for run in group.runs])
        rates = rates[np.isfinite(rates)]
        if not rates.size:
            continue
        low, high = np.quantile(rates, (0.1, 0.9))
        found.append(f"{group.label}: median {short(median_rate(group))} tokens/s, the middle 80 % of the steps from "
                     f"{short(low)} to {short(high)}.")
        for run in group.runs:
            share, lost = slow_steps(run)
            if is_disturbed(run):
                found.append(f"{run.label} was disturbed: {100 * share:.0f} % of its steps took more than {SLOW:g} "
                             f"times the median, {100 * lost:.0f} % of its time went beyond it. Its "
                             "seconds say more of the machine than of the run; compare tokens or FLOPs.")
    return found


def norm_findings(groups):
    found = []
    for group in groups:
        norms = [values(run.steps, "grad_norm") for run in group.runs]
        norms = [norm[np.isfinite(norm)] for norm in norms]
        norms = [norm for norm in norms if norm.size]
        if norms:
            last = np.concatenate([norm[-max(1, len(norm) // 10):] for norm in norms])
            found.append(f"{group.label}: median {np.median(last):.3g} over the last tenth; the highest of all steps "
                         f"was {max(norm.max() for norm in norms):.3g}.")
    return found


def load_findings(run):
    relative, last = run.load_at_end(), run.loads()[-1][1]
    layer, expert = np.unravel_index(int(np.argmax(relative)), relative.shape)
    dead = int((last == 0).sum())
    variation = float(np.mean(relative.std(axis=1)))
    return [f"{run.label}: over the last tenth the busiest expert ({expert} of mixture {layer}) gets "
            f"{relative.max():.2f} fair shares and the least used {relative.min():.2f}; the deviation of the loads is "
            f"{variation:.2f} of a fair share.",
            f"{run.label}: in the last step {dead} of {last.size} experts got nothing."
            if dead else f"{run.label}: no expert was idle in the last step."]


def spread_findings(relative):
    """relative: steps by experts of all mixtures, 1 is a fair share."""
    tenth = max(1, len(relative) // 10)
    first, last = (np.quantile(part, (0.1, 0.9)) for part in (relative[:tenth], relative[-tenth:]))
    if tenth == len(relative):
        return []
    change = (last[1] - last[0]) - (first[1] - first[0])
    words = "as wide as" if abs(change) < 0.05 else "narrower than" if change < 0 else "wider than"
    return [f"The middle 80 % of the loads lie from {last[0]:.2f} to {last[1]:.2f} fair shares over the last tenth, "
            f"{words} over the first, from {first[0]:.2f} to {first[1]:.2f}."]
