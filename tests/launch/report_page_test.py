"""The page of launch/report.py over made-up runs: it stands alone, shows each picture once against every axis, says
what the runs were and what to see in them, and stays readable where steps were held up.
"""

import html.parser
import json
import re
import shutil
import subprocess
import unittest

import numpy as np
import report_test
import report_findings
import report_page
import run_curves
import run_facts
import run_metrics
from report_test import held_out, step

START = {"first_step": 1, "started": "2026-11-29T01:02:03Z", "command": ["upmoe", "train", "my run.yaml"],
         "folder": "/w", "program": {"version": "0.1.0", "commit": "abc123-dirty", "digest": "0badcafe"},
         "machine": "A processor, 8 GiB", "hosts": 2, "cores": "2 ranks x 4 threads", "ranks": 2,
         "mesh": "pp 1, dp 2", "precision": "bf16",
         "model": {"source": "/models/<moe>", "start": "its weights", "type": "qwen2_moe", "layers": 4, "mixtures": 4,
                   "experts": 60, "experts_per_token": 4.0, "parameters": 1234567, "activated": 7654},
         "teacher": {"source": "/models/<dense>", "type": "qwen2", "layers": 3, "parameters": 765432, "weight": 0.5,
                     "temperature": 2.0},
         "recipe": {"recipe": "seed: 77\n", "report": "/models/moe/upcycle_report.json",
                    "source": {"files": [{"name": "dense.safetensors"}]}, "step_zero": {"loss": 3.25}},
         "frozen": "3 of 41 parameters: layers.*.moe.router_ED x 3", "kept_in_fp32": None,
         "data": {"words": "9 sequences of 16 tokens", "train": [{"path": "/t.h5", "tokens": 4321, "documents": 5,
                                                                  "weight": 1.0, "identity": "99"}],
                  "held_out": [{"path": "/v.h5", "tokens": 777, "sequences": 48, "name": "code"}]}}
VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADS = {"src", "href", "srcset", "action", "data", "poster", "background"}


class Page(html.parser.HTMLParser):
    """Tags that match, and what they name."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.tags, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loads += [(name, value) for name, value in attributes if name in LOADS]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> at {self.getpos()} closes something else")

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


def figures_of(text):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)[1])


class ReportPage(report_test.RunDirectories):
    def counted(self, i, experts=0, **changes):
        return step(i, experts) | {"ranks": 2} | changes

    def page(self, *arguments):
        done = self.report(*arguments, "--out", self.folder / "out")
        self.assertEqual(done.returncode, 0, done.stderr)
        return (self.folder / "out" / "report.html").read_text(encoding="utf-8")

    def two_runs(self):
        dense = self.run_dir("dense", [self.counted(1), held_out(1), self.counted(2), self.counted(3), held_out(3)])
        moe = self.run_dir("moe", [self.counted(1, 4), held_out(1), self.counted(2, 4, loss=None),
                                   self.counted(3, 4, flops=5e9), held_out(3)])
        (moe / "starts.jsonl").write_text(json.dumps(START) + "\n", encoding="utf-8")
        (dense / "config.yaml").write_text("# from step 2 on: x\nrun: {dir: a}\noptimizer: {lr: 0.5, clip: 1}\n")
        (moe / "config.yaml").write_text("run: {dir: b}\noptimizer: {lr: 0.25, clip: 1}\nfreeze: [x]\n")
        return dense, moe

    def test_it_stands_alone_and_is_whole(self):
        text = self.page(*self.two_runs())
        page = Page(text)
        self.assertEqual(page.open, [])
        self.assertEqual(page.loads, [], "the page names something that it would load")
        policy = [attributes["content"] for tag, attributes in page.tags
                  if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"]
        self.assertEqual(len(policy), 1)
        self.assertIn("default-src 'none'", policy[0])
        self.assertNotIn("http", policy[0])
        self.assertNotIn("@import", report_page.STYLE)
        self.assertIn(report_page.get_plotlyjs(), text)

    def test_each_figure_stands_once_and_against_every_axis(self):
        text = self.page(*self.two_runs())
        page, data = Page(text), figures_of(text)
        self.assertEqual(len(page.ids), len(set(page.ids)))
        names = [figure["id"] for figure in data["figures"]]
        self.assertEqual(names, ["loss", "heldout", "throughput", "norm", "load-0", "spread-0"])
        self.assertTrue(set(names) <= set(page.ids))
        self.assertEqual([tag for tag, _ in page.tags if tag in ("img", "svg", "canvas")], [])
        drawn = [json.dumps(figure.get("lines") or figure["map"]) for figure in data["figures"]]
        self.assertEqual(len(drawn), len(set(drawn)), "a figure is drawn twice")
        self.assertEqual([axis for axis, _ in data["axes"]], ["tokens", "flops", "seconds", "step"])
        for figure in data["figures"]:
            for line in figure.get("lines", []):
                self.assertEqual(set(line["parts"]), {"tokens", "flops", "seconds", "step"})
                for part in line["parts"].values():
                    for curve in [part, *([part["raw"]] if "raw" in part else [])]:
                        self.assertEqual(len(curve["x"]), len(curve["y"]))
        spread = {line["name"]: line for line in data["figures"][5]["lines"]}
        self.assertEqual([name for name, line in spread.items() if line.get("alone")], ["all experts", "middle 80 %"])
        for name, line in spread.items():  # the median is drawn once, not again with each area
            self.assertEqual(bool(line["parts"]["step"]["y"]), name == "median")
            self.assertEqual("band" in line["parts"]["step"], name != "median")
        self.assertEqual(data["figures"][5]["level"], 1)
        flops = data["figures"][0]["lines"][1]["parts"]["flops"]["x"]
        self.assertEqual(flops, [2e9, 4e9, 14e9])  # of both ranks
        uncounted = self.run_dir("uncounted", [step(1), step(2)])
        self.assertEqual([axis for axis, _ in figures_of(self.page(uncounted))["axes"]], ["tokens", "seconds", "step"])

    # Sets come and go with data.valid; what was evaluated together is their own figure.
    def test_held_out_sets_have_a_figure_of_their_own(self):
        sets = [held_out(1) | {"valid_loss": {"code": 3.0, "prose": 5.0}},
                held_out(2) | {"valid_loss": {"code": 2.0, "prose": 4.5, "late": 1.0}}]
        one = self.run_dir("one", [self.counted(1), sets[0], self.counted(2), sets[1]])
        two = self.run_dir("two", [self.counted(1), held_out(1), self.counted(2), held_out(2)])
        figures = {figure["id"]: figure for figure in figures_of(self.page(one, two))["figures"]}
        lines = {line["name"]: line for line in figures["sets"]["lines"]}
        self.assertEqual({name: line["parts"]["step"]["y"] for name, line in lines.items()},
                         {"one: code": [3.0, 2.0], "one: prose": [5.0, 4.5], "one: late": [1.0]})
        self.assertEqual(lines["one: late"]["parts"]["step"]["x"], [2.0])
        self.assertEqual(len({line["dash"] for line in lines.values()}), 3)
        self.assertIn("code: one: from 3.0000 to 2.0000.", figures["sets"]["findings"])
        self.assertEqual(len(figures["heldout"]["lines"]), 2)
        self.assertTrue((self.folder / "out" / "heldout_sets.png").read_bytes().startswith(b"\x89PNG"))
        alone = self.run_dir("alone", [self.counted(1), held_out(1) | {"valid_loss": {"code": 9.0}}])
        for run in (two, alone):
            self.assertNotIn("sets", [figure["id"] for figure in figures_of(self.page(run))["figures"]])

    def test_it_says_what_the_runs_were(self):
        text = " ".join(Page(self.page(*self.two_runs())).words)
        for words in ("upmoe train 'my run.yaml'   (on 2 ranks)", "in /w",
                      "commit abc123 with changes, program 0badcafe",
                      "A processor, 8 GiB; 2 hosts; 2 ranks x 4 threads",
                      "pp 1, dp 2", "/models/<moe> (its weights)",
                      "60 experts of which 4 compute a token", "1,234,567 parameters", "3 of 41 parameters",
                      "/models/<dense>: qwen2, 3 layers; 765,432 parameters; weight 0.5 of the loss, temperature 2.0",
                      "4,321 tokens, 5 documents, weight 1.0, digest 99", "seed: 77", "dense.safetensors",
                      "code: /v.h5: 777 tokens, 48 sequences",
                      "its loss at step 0: 3.2500", "not recorded", "# from step 2 on: x"):
            self.assertIn(words, text)
        facts = [run_facts.read_facts(self.folder / name) for name in ("dense", "moe")]
        self.assertEqual(run_facts.differences(facts), [("optimizer.lr", ["0.5", "0.25"]), ("freeze", ["-", "['x']"])])

    def test_names_with_commas_stay_apart_in_its_title(self):
        runs = self.two_runs()
        text = self.page(*runs, "--label", "dense", "--label", "dense, <continued>")
        self.assertIn("<h1>upmoe: dense \u00b7 dense, &lt;continued&gt;</h1>", text)

    def test_every_start_of_a_run_is_told(self):
        run = self.run_dir("run", [self.counted(1), self.counted(2)])
        later = START | {"first_step": 2, "ranks": 5, "started": "2026-12-01T00:00:00Z", "recipe": None,
                         "model": START["model"] | {"start": "going on after step 1"}}
        (run / "starts.jsonl").write_text(json.dumps(START) + "\n" + json.dumps(later) + "\n", encoding="utf-8")
        text = " ".join(Page(self.page(run)).words)
        for words in ("2 starts", "step 2: 2026-12-01T00:00:00Z, 5 ranks", "step 1: 2026-11-29T01:02:03Z, 2 ranks",
                      "/models/<moe> (its weights)", "seed: 77"):
            self.assertIn(words, text)

    def test_how_a_model_was_fine_tuned(self):
        run = self.run_dir("run", [self.counted(1), self.counted(2)])
        other = {"path": "/u.h5", "tokens": 55, "documents": 1, "weight": 1.0, "identity": "7"}
        start = START | {"data": START["data"] | {"train": [*START["data"]["train"], other]}}
        (run / "starts.jsonl").write_text(json.dumps(start) + "\n", encoding="utf-8")
        masked = ", of which the targets that its loss mask names count"
        for rank, asked, held_out_masked in ((8, "true", masked), (0, "false", "")):
            (run / "config.yaml").write_text(
                f"lora: {{rank: {rank}, alpha: 16, targets: [q_proj, up_proj]}}\ndata:\n  valid_loss_mask: {asked}\n"
                "  train: [{path: t.h5, loss_mask: true}, {path: u.h5, loss_mask: false}]\n")
            page = Page(self.page(run))
            self.assertEqual("rank 8, alpha 16, targets q_proj up_proj; they alone train" in page.words, rank == 8)
            text = " ".join(page.words)
            self.assertIn(f"/t.h5: 4,321 tokens{masked}, 5 documents", text)
            self.assertIn("/u.h5: 55 tokens, 1 documents", text)
            self.assertIn(f"/v.h5: 777 tokens{held_out_masked}, 48 sequences", text)

    # Nothing in a file is taken at its word.
    def test_odd_records(self):
        for i, start in enumerate(({}, {"command": 3, "model": [], "data": {"train": 7}, "recipe": "x", "program": 1,
                                        "teacher": 5},
                                   {"model": {"experts": 1}, "recipe": {"source": {"files": [1]}}, "hosts": "a",
                                    "data": {"train": [4, {}]}})):
            run = self.run_dir(f"odd_{i}", [self.counted(1), self.counted(2)])
            (run / "starts.jsonl").write_text(json.dumps(start) + "\n", encoding="utf-8")
            config = ("a: {b: [1, {c: </script>}]}", "[]", "data: {train: [3]}\nlora: {rank: x}")[i]
            (run / "config.yaml").write_text(config, encoding="utf-8")
            self.assertEqual(Page(self.page(run)).open, [])
        broken = self.run_dir("broken", [self.counted(1)])
        (broken / "starts.jsonl").write_text(json.dumps(START) + "\nnonsense\n", encoding="utf-8")
        self.refused("starts.jsonl:2", broken)
        (broken / "starts.jsonl").unlink()
        (broken / "config.yaml").write_text("a: [", encoding="utf-8")
        self.refused("config.yaml: not a run configuration", broken)

    def test_its_script_draws_all_figures_and_changes_the_axis(self):
        node = shutil.which("node")
        if not node:
            self.skipTest("no node is installed")
        text = self.page(*self.two_runs())
        buttons = re.findall(r'<button type="button" data-axis="(\w+)"', text)
        script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[-1]
        program = f"""
const calls = [], buttons = {json.dumps(buttons)}.map((axis) => ({{ dataset: {{ axis }}, state: "",
  setAttribute(_, value) {{ this.state = value; }}, addEventListener(_, f) {{ this.click = f; }} }}));
const Plotly = {{ newPlot: (...all) => calls.push(all), react: (...all) => calls.push(all) }};
const window = {{ matchMedia: () => ({{ matches: false }}) }};
const document = {{ getElementById: () => ({{ textContent: {json.dumps(json.dumps(figures_of(text)))} }}),
                   querySelectorAll: () => buttons }};
{script}
const first = calls.splice(0);
buttons[1].click();
console.log(JSON.stringify({{ first, then: calls, pressed: buttons.map((button) => button.state) }}));
"""
        done = subprocess.run([node, "-"], input=program, capture_output=True, text=True, check=True)
        drawn = json.loads(done.stdout)
        self.assertEqual(sorted(call[0] for call in drawn["first"]),
                         ["heldout", "load-0", "loss", "norm", "spread-0", "throughput"])
        self.assertEqual(sorted(call[0] for call in drawn["then"]),
                         ["heldout", "loss", "norm", "spread-0", "throughput"])
        self.assertEqual(drawn["pressed"], ["false", "true", "false", "false"])
        named = {call[0]: {trace["name"]: trace["x"] for trace in call[1] if "name" in trace} for call in drawn["then"]}
        self.assertEqual(named["loss"]["moe"], [2e9, 4e9, 14e9])
        self.assertEqual(drawn["then"][0][2]["xaxis"]["title"]["text"], "FLOPs")
        for _, _, layout, _ in drawn["then"]:
            self.assertEqual(layout["hoverdistance"], -1)            # values also between points that lie far apart
            self.assertEqual(layout["legend"]["uirevision"], "names")  # what is hidden stays so

    def test_a_run_that_goes_on_begins_behind_the_first_on_every_axis(self):
        first = self.run_dir("first", [self.counted(1), self.counted(2)])
        then = self.run_dir("then", [self.counted(1), self.counted(2)])
        lines = figures_of(self.page(first, then, "--continued"))["figures"][0]["lines"]
        for axis, x in (("tokens", [300, 400]), ("flops", [6e9, 8e9]), ("seconds", [1.5, 2.0]), ("step", [3, 4])):
            self.assertEqual(lines[1]["parts"][axis]["x"], x)


class Disturbed(unittest.TestCase):
    def group(self, rates, label="a"):
        steps = [{"step": i + 1, "tokens": 100 * (i + 1), "loss": 3.0, "seconds": 100 / rate, "tokens_per_s": rate}
                 for i, rate in enumerate(rates)]
        return run_curves.Group(label, "#000000", [run_metrics.Run(None, label, "#000000", steps)])

    def test_medians_and_limits_stay_where_the_steady_steps_are(self):
        rates = [1000.0] * 400
        for i in range(0, 400, 9):
            rates[i] = 20.0      # held up
        rates[100] = 1e6         # a clock that jumped
        group = self.group(rates)
        line = run_curves.throughput_line(group, "step")
        self.assertTrue((line.y == 1000.0).all())
        self.assertLessEqual(len(line.x), 200)
        low, high = run_curves.throughput_limits([group])
        self.assertEqual(low, 0.0)
        self.assertAlmostEqual(high, 1150.0)
        words = " ".join(report_findings.throughput_findings([group]))
        self.assertIn("median 1k tokens/s", words)
        self.assertIn("a was disturbed: 11 % of its steps", words)
        steady = self.group([1000.0] * 50)
        self.assertNotIn("disturbed", " ".join(report_findings.throughput_findings([steady])))
        rates = [row[5] for row in report_page.summary_rows(group.runs + steady.runs)]
        self.assertEqual(rates, ["1k, disturbed", "1k"])

    def test_quantiles_around_each_place(self):
        y = np.array([5.0, 1.0, np.nan, 3.0, 2.0, 4.0])
        places, found = run_metrics.rolling_quantiles(y, (0.0, 0.5, 1.0))
        for i, place in enumerate(places):
            near = y[max(0, place - 2):place + 3]
            near = near[np.isfinite(near)]
            self.assertEqual([near.min(), np.median(near), near.max()], list(found[:, i]))


class Findings(unittest.TestCase):
    def group(self, label, losses, evals, flops):
        steps = [{"step": i + 1, "tokens": 100 * (i + 1), "loss": loss, "seconds": 1.0, "tokens_per_s": 100.0,
                  "flops": flops, "ranks": 1} for i, loss in enumerate(losses)]
        records = [{"kind": "eval", "step": i, "tokens": 100 * i, "eval_loss": loss} for i, loss in evals]
        return run_curves.Group(label, "#000000", [run_metrics.Run(None, label, "#000000", steps, records)])

    # Lines are compared where both are: b ends after half of a's tokens, and at equal FLOPs a is ahead again.
    def test_losses_are_compared_at_equal_cost(self):
        a = self.group("a", [4.0, 3.0, 2.0, 1.0], [(0, 5.0), (2, 3.0), (4, 1.0)], 10.0)
        b = self.group("b", [4.0, 2.5], [(0, 5.0), (2, 2.5)], 20.0)
        found = report_findings.loss_findings([a, b], ["tokens", "flops"], "eval_loss")
        self.assertIn("At equal tokens (200), lowest first: b 2.5000; a 3.0000 (0.5000 above). Not at its end there, "
                      "where a learning rate that falls brings the loss down: a.", found)
        self.assertIn("At equal FLOPs (40), lowest first: a 1.0000; b 2.5000 (1.5000 above).", found)
        equal = report_findings.loss_findings([a, self.group("c", [4.0], [(0, 5.0), (4, 1.001)], 10.0)], ["tokens"],
                                              "eval_loss")
        self.assertIn("c 1.0010 (equal within 0.002)", " ".join(equal))

    # Where the first run ends the others only begin: what they came to says which of them is ahead.
    def test_runs_that_go_on_are_compared_where_they_have_gone_to(self):
        first, b, c = (self.group(label, [4.0, 3.0], [(0, 5.0), (2, end)], 10.0)
                       for label, end in (("a", 3.0), ("b", 2.0), ("c", 2.5)))
        for group in (b, c):
            group.runs[0].starts = {"tokens": 200.0, "flops": 20.0, "seconds": 2.0, "step": 2.0}
        found = report_findings.loss_findings([first, b, c], ["tokens", "flops", "seconds", "step"], "eval_loss")
        self.assertEqual(found[3:], [f"At equal {axis}, lowest first: b 2.0000; c 2.5000 (0.5000 above)."
                                     for axis in ("tokens (400)", "FLOPs (40)", "seconds of training (4)")])
        for i in range(1, 20):
            c.runs[0].steps.append(c.runs[0].steps[-1] | {"step": 2 + i, "seconds": 9.0 if i % 5 == 0 else 1.0})
        found = report_findings.loss_findings([first, b, c], ["tokens", "seconds"], "eval_loss")
        self.assertNotIn("disturbed", found[3])
        self.assertIn("Their seconds are the machine's, which was disturbed: c.", found[4])

    def test_norms_and_the_spread_of_loads_are_told(self):
        group = self.group("a", [4.0] * 21, [], 1.0)
        for record, norm in zip(group.runs[0].steps, [None, 9.0, *[1.0] * 17, 0.25, 0.75]):
            record["grad_norm"] = norm
        self.assertEqual(report_findings.norm_findings([group]),
                         ["a: median 0.5 over the last tenth; the highest of all steps was 9."])
        wide, even = [[0.0, 2.0]] * 10, [[1.0, 1.0]] * 10
        for loads, words in ((wide + even, "narrower"), (even + wide, "wider"), (even + even, "as wide")):
            found = report_findings.spread_findings(np.array(loads))
            self.assertEqual(len(found), 1)
            self.assertIn(words, found[0])
        self.assertIn("from 1.00 to 1.00 fair shares over the last tenth, narrower than over the first, "
                      "from 0.00 to 2.00", report_findings.spread_findings(np.array(wide + even))[0])
        self.assertEqual(report_findings.spread_findings(np.array(wide[:1])), [])

    def test_a_held_out_loss_that_rises_again_is_told(self):
        risen = report_findings.loss_findings([self.group("a", [1.0], [(0, 5.0), (1, 2.0), (2, 2.2)], 1.0)], ["tokens"],
                                              "eval_loss")
        self.assertIn("its lowest was 2.0000 at 100, and it has risen since", risen[0])
        none = report_findings.loss_findings([self.group("a", [1.0], [], 1.0)], ["tokens"], "eval_loss")
        self.assertIn("no held-out evaluation", none[0])

    def test_idle_and_busy_experts_are_named(self):
        run = run_metrics.Run(None, "a", "#000000", [{"expert_load": [[0.25, 0.25, 0.25, 0.25], [0.0, 0.75, 0.25, 0.0]],
                                                      "step": 1}])
        words = report_findings.load_findings(run)
        self.assertIn("the busiest expert (1 of mixture 1) gets 3.00 fair shares and the least used 0.00", words[0])
        self.assertIn("2 of 8 experts got nothing", words[1])


if __name__ == "__main__":
    unittest.main()
