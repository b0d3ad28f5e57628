"""upmoe generate from outside: what it prints, what it takes, what it refuses. Needs UPMOE_BINARY and, for text,
tokenizers.
"""

import json
import os
import shutil
import subprocess
import sys
import unittest
from unittest import mock

import cli_test
from cli_test import BINARY, upmoe


class Generate(cli_test.CliTest):
    def made(self, *arguments, ranks=0):
        done = upmoe("generate", self.model, *arguments, ranks=ranks)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def answers(self, *arguments, ranks=0):
        return [json.loads(line) for line in self.made("--json", *arguments, ranks=ranks).stdout.splitlines()]

    def write_batch(self, *lines):
        path = self.folder / "batch.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    def write_tokenizer(self):
        import tokenizers
        from tokenizers import models, pre_tokenizers
        words = {f"w{i}": i for i in range(100)} | {"<end>": 100}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<end>"])
        tokenizer.save(str(self.model / "tokenizer.json"))

    def test_tokens_in_tokens_out(self):
        answer, = self.answers("--tokens", "3,1,4", "--max-new-tokens", "9", "--ignore-eos")
        self.assertEqual(set(answer), {"tokens", "text", "tokens_per_s"})
        self.assertEqual(len(answer["tokens"]), 9)
        self.assertIsNone(answer["text"])
        self.assertGreater(answer["tokens_per_s"], 0)
        done = self.made("--tokens", "3,1,4", "--max-new-tokens", "9", "--ignore-eos")
        self.assertEqual(done.stdout, ",".join(map(str, answer["tokens"])) + "\n")
        self.assertRegex(done.stderr, r"3 tokens of prompts in .* s, 9 new ones in .* tokens/s")

    def test_a_token_that_ends_text_ends_the_answer(self):
        free = self.answers("--tokens", "3,1,4", "--max-new-tokens", "9", "--ignore-eos")[0]["tokens"]
        (self.model / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[4], 100]}))
        tokens = self.answers("--tokens", "3,1,4", "--max-new-tokens", "9")[0]["tokens"]
        ends = {free[4], 100, 0}  # 0: of config.json
        first = next(i for i, token in enumerate(free) if token in ends)
        self.assertEqual(tokens, free[:first + 1])
        self.assertEqual(self.answers("--tokens", "3,1,4", "--max-new-tokens", "9", "--ignore-eos")[0]["tokens"], free)

    def test_a_python_without_the_package_is_usage(self):
        self.write_tokenizer()
        bare = self.folder / "python"
        bare.write_text(f"#!/bin/sh\nexec {sys.executable} -S \"$@\"\n", encoding="utf-8")
        bare.chmod(0o755)
        with mock.patch.dict(os.environ, {"UPMOE_PYTHON": str(bare)}):
            done = upmoe("generate", self.model, "--prompt", "w1", "--max-new-tokens", "1")
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("cannot import tokenizers; run launch/setup.sh", done.stderr)

    def test_draws_go_by_the_seed(self):
        def drawn(*more):
            return self.answers("--tokens", "7", "--max-new-tokens", "20", "--ignore-eos", "--temperature", "2",
                                *more)[0]["tokens"]
        self.assertEqual(drawn("--seed", "5"), drawn("--seed", "5"))
        self.assertNotEqual(drawn("--seed", "5"), drawn("--seed", "6"))
        greedy = self.answers("--tokens", "7", "--max-new-tokens", "20", "--ignore-eos")[0]["tokens"]
        self.assertEqual(drawn("--top-k", "1"), greedy)
        self.assertEqual(drawn("--top-p", "1e-6"), greedy)
        warning = "no effect without --temperature"
        for option, value in (("--top-k", "5"), ("--top-p", "0.5")):
            self.assertIn(warning, self.made("--tokens", "7", option, value).stderr)
        self.assertNotIn(warning, self.made("--tokens", "7", "--top-k", "5", "--temperature", "1").stderr)

    def test_a_file_of_prompts(self):
        batch = self.write_batch('{"tokens": [3, 1, 4]}', "", '{"tokens": [7]}', '{"tokens": [1, 2, 3, 4, 5, 6]}')
        answers = self.answers("--batch", batch, "--max-new-tokens", "6", "--ignore-eos")
        self.assertEqual([len(a["tokens"]) for a in answers], [6, 6, 6])
        for answer, tokens in zip(answers, ("3,1,4", "7", "1,2,3,4,5,6"), strict=True):
            alone, = self.answers("--tokens", tokens, "--max-new-tokens", "6", "--ignore-eos")
            self.assertEqual(answer["tokens"], alone["tokens"])
        shown = self.made("--batch", batch, "--max-new-tokens", "6", "--ignore-eos").stdout
        self.assertEqual(shown, "".join(f"[{i}] {','.join(map(str, a['tokens']))}\n" for i, a in enumerate(answers)))
        for rows in (1, 2):  # the others wait
            self.assertEqual([a["tokens"] for a in self.answers("--batch", batch, "--max-new-tokens", "6",
                                                                "--ignore-eos", "--rows", rows)],
                             [a["tokens"] for a in answers])
        for ranks, more in ((2, ()), (2, ("--rows", "1")), (3, ("--tp", "3"))):
            self.assertEqual([a["tokens"] for a in self.answers("--batch", batch, "--max-new-tokens", "6",
                                                                "--ignore-eos", *more, ranks=ranks)],
                             [a["tokens"] for a in answers], f"{ranks} ranks")

    def test_text(self):
        self.write_tokenizer()
        with mock.patch.dict("os.environ", UPMOE_PYTHON=sys.executable):
            answer, = self.answers("--prompt", "w3 w1 w4", "--max-new-tokens", "9", "--ignore-eos")
            same, = self.answers("--tokens", "3,1,4", "--max-new-tokens", "9", "--ignore-eos")
            self.assertEqual(answer["tokens"], same["tokens"])
            self.assertEqual(answer["text"], " ".join(f"w{t}" for t in answer["tokens"] if t != 100))
            shown = self.made("--prompt", "w3 w1 w4", "--max-new-tokens", "9", "--ignore-eos").stdout
            self.assertEqual(shown, answer["text"] + "\n")
            # Longer than what is decoded at once while it comes.
            long = ("--prompt", "w3 w1 w4", "--max-new-tokens", "150", "--ignore-eos", "--temperature", "3")
            self.assertEqual(self.made(*long).stdout, self.answers(*long)[0]["text"] + "\n")
            batch = self.write_batch('{"prompt": "w3 w1 w4"}', '{"tokens": [3, 1, 4]}')
            two = self.answers("--batch", batch, "--max-new-tokens", "9", "--ignore-eos")
            self.assertEqual([a["text"] for a in two], [answer["text"]] * 2)

    # Runs of bytes are decoded as one; what only tokenizer_config.json calls special is no text.
    def test_bytes_and_special_tokens_as_they_come(self):
        import tokenizers
        from tokenizers import decoders, models
        words = {f"<0x{byte:02X}>": i for i, byte in enumerate([0x41, *range(0x80, 0xE0)])}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(words | {"<stop>": 97, "w": 98}, unk_token="w"))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.save(str(self.model / "tokenizer.json"))
        (self.model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
        more = ("--tokens", "1,2", "--max-new-tokens", "60", "--ignore-eos", "--temperature", "50")
        with mock.patch.dict("os.environ", UPMOE_PYTHON=sys.executable):
            for seed in range(4):
                answer, = self.answers(*more, "--seed", seed)
                self.assertNotIn("<stop>", answer["text"])
                self.assertEqual(self.made(*more, "--seed", seed).stdout, answer["text"] + "\n", seed)

    def test_settings_that_are_not_followed_are_told(self):
        (self.model / "generation_config.json").write_text(json.dumps(
            {"repetition_penalty": 1.05, "num_beams": 1, "temperature": 0.7, "bad_words_ids": None,
             "suppress_tokens": []}))
        said = self.made("--tokens", "3", "--max-new-tokens", "1").stderr
        self.assertIn("generation_config.json: repetition_penalty 1.05 is not followed here", said)  # and nothing else
        (self.model / "generation_config.json").write_text("{")
        self.assertIn("it is no JSON object", self.made("--tokens", "3", "--max-new-tokens", "1").stderr)
        batch = self.write_batch('{"tokens": [3], "max_tokens": 2, "id": 7}')
        said = self.made("--batch", batch, "--max-new-tokens", "1").stderr
        self.assertIn("line 1: 'max_tokens' means nothing in a prompt", said)
        self.assertNotIn("'id'", said)

    def test_turns_by_the_chat_template(self):
        self.write_tokenizer()
        template = ("{% for m in messages %}{{ m['role'] == 'user' and 'w10 ' or 'w11 ' }}{{ m['content'] }} "
                    "{{ eos_token }} {% endfor %}{% if add_generation_prompt %}w11{% endif %}")
        (self.model / "tokenizer_config.json").write_text(json.dumps(
            {"chat_template": template, "eos_token": {"content": "<end>"}}))
        more = ("--max-new-tokens", "9", "--ignore-eos")
        with mock.patch.dict("os.environ", UPMOE_PYTHON=sys.executable):
            answer, = self.answers("--prompt", "w3 w1", "--chat", *more)
            self.assertEqual(answer["tokens"], self.answers("--tokens", "10,3,1,100,11", *more)[0]["tokens"])
            turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"},
                     {"role": "user", "content": "w5"}]
            answer, = self.answers("--batch", self.write_batch(json.dumps({"messages": turns})), *more)
            self.assertEqual(answer["tokens"],
                             self.answers("--tokens", "10,3,100,11,4,100,10,5,100,11", *more)[0]["tokens"])
            # A file of its own comes first; of several by name the one called default.
            (self.model / "chat_template.jinja").write_text("w20 {{ messages[0]['content'] }} w21")
            self.assertEqual(self.answers("--prompt", "w3 w1", "--chat", *more)[0]["tokens"],
                             self.answers("--tokens", "20,3,1,21", *more)[0]["tokens"])
            (self.model / "chat_template.jinja").unlink()
            several = [{"name": "tools", "template": "w5"}, {"name": "default", "template": "w6 w7"}]
            (self.model / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
            self.assertEqual(self.answers("--prompt", "w3 w1", "--chat", *more)[0]["tokens"],
                             self.answers("--tokens", "6,7", *more)[0]["tokens"])
            # What transformers gives to every template, and its marks of answers, which are no text.
            template = "{% if tools is not none %}w5 {% endif %}{% generation %}w6{% endgeneration %} w7"
            (self.model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
            self.assertEqual(self.answers("--prompt", "w3 w1", "--chat", *more)[0]["tokens"],
                             self.answers("--tokens", "6,7", *more)[0]["tokens"])
            # Tools and calls of them, whose arguments are an object in either form.
            template = ("{{ tools[0].name }} {% for m in messages %}"
                        "{{ m.content or m.tool_calls[0].arguments.a }} {% endfor %}")
            (self.model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
            turns = [{"role": "user", "content": [{"type": "text", "text": "w3"}]},
                     {"role": "assistant", "tool_calls": [{"arguments": '{"a": "w4"}'}]},
                     {"role": "tool", "content": "w5"}]
            batch = self.write_batch(json.dumps({"messages": turns, "tools": [{"name": "w9"}]}))
            self.assertEqual(self.answers("--batch", batch, *more)[0]["tokens"],
                             self.answers("--tokens", "9,3,4,5", *more)[0]["tokens"])
            turns[0]["content"] = [{"type": "image"}]
            batch = self.write_batch('{"prompt": "w3"}', json.dumps({"messages": turns}))
            self.refused(3, ["line 2: messages: 'content of turn 0' holds"], "generate", self.model, "--batch", batch)
            for wrong, words in (("{{ raise_exception('only one turn') }}", "only one turn"), ("{% if %}", "refuses"),
                                 (None, "no chat template")):
                (self.model / "tokenizer_config.json").write_text(json.dumps({"chat_template": wrong}))
                self.refused(3, [words], "generate", self.model, "--prompt", "w3", "--chat")

    def config_alone(self, name, **changes):
        folder = self.folder / name
        folder.mkdir()
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return folder

    def test_times(self):
        other = self.config_alone("other", num_hidden_layers=1)
        machine = self.folder / "machine.yaml"
        machine.write_text("name: this\nsource: a test\nbf16_tflops: 0.5\nmemory_gb: 8\nmemory_gb_per_s: 10\n")
        request = ("--in", "6", "--out", "4")
        done = upmoe("generate", self.model, other / "config.json", "--bench", *request, "--concurrency", "4,1,4",
                     "--rounds", "2", "--precision", "bf16", "--machine", machine, "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("other: a configuration alone; its weights are random", done.stderr)
        self.assertNotIn("model: a configuration alone", done.stderr)
        self.assertRegex(done.stderr, r"other, 4 at once: 24 tokens of prompts in .* s, 16 new ones in")
        result = json.loads(done.stdout)
        self.assertEqual({key: result[key] for key in ("precision", "ranks", "prompt", "output", "rounds", "machine")},
                         {"precision": "bf16", "ranks": 1, "prompt": 6, "output": 4, "rounds": 2, "machine": "this"})
        self.assertEqual([(m["name"], m["random_weights"]) for m in result["models"]],
                         [("model", False), ("other", True)])
        cost = upmoe("cost", "--inference", self.model, other, *request, "--machine", machine, "--json")
        at_best = {b["batch"]: b for b in json.loads(cost.stdout)["batches"]}
        first = result["models"][0]["rates"]
        for place, model in enumerate(result["models"]):
            self.assertEqual([r["concurrency"] for r in model["rates"]], [1, 4])
            for r, of_first in zip(model["rates"], first, strict=True):
                n = r["concurrency"]
                self.assertAlmostEqual(r["prefill_tokens_per_s"] * r["prefill_seconds"], 6 * n, places=6)
                self.assertAlmostEqual(r["decode_tokens_per_s"] * r["decode_seconds"], 3 * n, places=6)
                self.assertAlmostEqual(r["requests_per_s"] * (r["prefill_seconds"] + r["decode_seconds"]), n, places=6)
                self.assertAlmostEqual(r["of_first"]["requests"], r["requests_per_s"] / of_first["requests_per_s"])
                self.assertGreaterEqual(r["seconds_per_token_95"], r["seconds_per_token"])
                for key in ("prefill_seconds", "decode_seconds"):
                    self.assertAlmostEqual(r["at_best"][key] / at_best[n][key][place], 1, places=9)
                self.assertAlmostEqual(r["at_best"]["decode_share"] * r["seconds_per_token"],
                                       r["at_best"]["decode_seconds"])
                self.assertGreater(r["weight_bytes"], r["key_bytes_per_request"])
                self.assertGreater(r["work_bytes"], 0)
        self.assertEqual(first[0]["of_first"], {"prefill": 1, "decode": 1, "requests": 1})
        # A row has room for 6 + 4 - 1 tokens.
        per_token = json.loads(upmoe("cost", other, "--seq-len", "16", "--json").stdout)[0]["kv_bytes_per_token"]
        self.assertAlmostEqual(result["models"][1]["rates"][1]["key_bytes_per_request"], 9 * per_token, delta=64)

    def test_times_for_people(self):
        done = self.made("--bench", "--in", "3", "--out", "2", "--rounds", "1")
        self.assertIn("requests of 3 tokens in and 2 out; medians of 1 round.", done.stdout)
        for words in ("decode, tokens/s", "keys and values of a request", "requests/s"):
            self.assertIn(words, done.stdout)
        for words in ("at best", "Random weights", "of the first"):
            self.assertNotIn(words, done.stdout)
        two = upmoe("generate", "tiny-1.8b-shape", self.model, "--bench", "--in", "3", "--out", "2", "--rounds", "1")
        self.assertEqual(two.returncode, 0, two.stderr)
        for words in ("Random weights, by a configuration alone: tiny-1.8b-shape.", "of the first: prefill",
                      "the models in turns"):
            self.assertIn(words, two.stdout)
        ranks = upmoe("generate", self.model, "--bench", "--in", "3", "--out", "2", "--rounds", "1", "--json", ranks=2)
        self.assertEqual(json.loads(ranks.stdout)["ranks"], 2, ranks.stderr)

    # 1, 4, 16, ... and as many as memory has room for beside all weights, of each model its own number.
    def test_times_what_fits(self):
        other = self.config_alone("other", num_hidden_layers=1)
        bench = ("--bench", "--in", "6", "--out", "4", "--rounds", "1")
        alone = {"model": self.model, "other": other}
        sizes = {}  # of the weights, and of a row: its keys and values, and its logits twice
        for name, model in alone.items():
            done = upmoe("generate", model, *bench, "--concurrency", "1", "--json")
            self.assertEqual(done.returncode, 0, done.stderr)
            result = json.loads(done.stdout)
            self.assertIsNone(result["rank_bytes"])
            self.assertIsNone(result["models"][0]["room"])
            at_one, = result["models"][0]["rates"]
            sizes[name] = at_one["weight_bytes"], at_one["key_bytes_per_request"] + 2 * 4 * 101
        weights = sum(weight for weight, _ in sizes.values())
        self.assertLess(sizes["other"][1], sizes["model"][1])
        room = weights + 20.5 * sizes["model"][1]
        memory = room / 0.8
        most = {name: int((room - weights) / row) for name, (_, row) in sizes.items()}
        self.assertEqual(most["model"], 20)
        auto = (*bench, "--concurrency", "auto", "--memory")
        done = upmoe("generate", *alone.values(), *auto, repr(memory * 1e-9), "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"other: room for {most['other']} requests at once; timed: 1, 4, 16, {most['other']}",
                      done.stderr)
        result = json.loads(done.stdout)
        self.assertAlmostEqual(result["rank_bytes"] / memory, 1)
        for model in result["models"]:
            n = most[model["name"]]
            self.assertEqual([r["concurrency"] for r in model["rates"]], [1, 4, 16, n])
            self.assertEqual({key: model["room"][key] for key in ("concurrency", "more_fit")},
                             {"concurrency": n, "more_fit": False})
        first, second = (model["rates"] for model in result["models"])
        self.assertIsNone(second[-1]["of_first"])  # which has no room for so many
        self.assertAlmostEqual(second[-2]["of_first"]["requests"],
                               second[-2]["requests_per_s"] / first[-2]["requests_per_s"])
        self.assertAlmostEqual(result["models"][1]["room"]["of_first"]["requests"],
                               second[-1]["requests_per_s"] / first[-1]["requests_per_s"])
        shown = upmoe("generate", *alone.values(), *auto, repr(memory * 1e-9)).stdout
        self.assertRegex(shown, r"As many at once as fit into 80 % of [0-9.e-]+ GB, beside the weights of all models:")
        self.assertRegex(shown, rf"\| *{most['other']} \| other .*\| *- \| *- \| *- \|\n")
        self.assertRegex(shown, rf"\| other *\| *{most['other']} \|")
        self.refused(2, ["model: no memory for one request of 6 tokens in and 4 out", "the weights of all 2 models",
                         "--tp"], "generate", *alone.values(), *auto, repr(weights * 1e-9))

    # By itself: what the host has left, by which a tiny model has room for more than are ever timed.
    def test_times_what_fits_into_the_host(self):
        for ranks, numbers in ((0, [1, 4, 16, 64]), (2, [1, 4, 16, 64, 128])):
            done = upmoe("generate", self.model, "--bench", "--in", "2", "--out", "2", "--rounds", "1", "--concurrency",
                         "auto", "--json", ranks=ranks)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stderr.count(f"room for more than {numbers[-1]} requests at once"), 1, done.stderr)
            result = json.loads(done.stdout)
            self.assertGreater(result["rank_bytes"], 0)
            self.assertEqual([r["concurrency"] for r in result["models"][0]["rates"]], numbers)
            self.assertTrue(result["models"][0]["room"]["more_fit"])

    def test_what_cannot_be_timed(self):
        model, bench = self.model, ("--bench", "--in", "3", "--out", "2")
        self.refused(2, ["--prompt"], "generate", model, *bench, "--prompt", "x")
        self.refused(2, ["--temperature"], "generate", model, *bench, "--temperature", "1")
        self.refused(2, ["--rows"], "generate", model, *bench, "--rows", "1")
        self.refused(2, ["--bench"], "generate", model, "--tokens", "1", "--in", "3")
        self.refused(2, ["--out"], "generate", model, "--bench", "--out", "1")
        for wrong in ("0", "1,-4", "1.5", "two", "auto,4", "4,auto", ""):
            self.refused(2, ["--concurrency: found '", "expected whole numbers above 0, such as 1,8,64, or auto alone"],
                         "generate", model, *bench, "--concurrency", wrong)
        self.refused(2, ["--memory", "--concurrency auto"], "generate", model, *bench, "--memory", "1")
        self.refused(2, ["--memory: found '0'"], "generate", model, *bench, "--concurrency", "auto", "--memory", "0")
        self.refused(2, ["--bench"], "generate", model, "--tokens", "1", "--memory", "1")
        self.refused(2, ["found 2 models", "--bench"], "generate", model, model, "--tokens", "1")
        self.refused(2, ["--in 65: model has positions for 64 tokens"], "generate", model, "--bench", "--in", "65",
                     "--out", "2")
        self.refused(2, ["no model 'none'", "tiny-7b-shape"], "generate", "none", *bench)
        machine = self.folder / "machine.yaml"
        machine.write_text("name: this\nsource: a test\nbf16_tflops: 0.5\nmemory_gb: 8\nmemory_gb_per_s: 10\n")
        self.refused(2, ["this", "fp32_tflops"], "generate", model, *bench, "--machine", machine)
        self.refused(2, ["--machine", "one device"], "generate", model, *bench, "--machine", machine, ranks=2)
        (self.config_alone("half") / "model-00001-of-00002.safetensors").write_bytes(b"")
        self.refused(3, ["without their index"], "generate", self.folder / "half", *bench)

    def test_an_answer_comes_as_it_is_made(self):
        command = [BINARY, "generate", self.model, "--tokens", "3", "--max-new-tokens", "1500", "--ignore-eos",
                   "--temperature", "3"]
        for between in (",", " "):  # numbers, and text
            here, there = os.pipe2(os.O_DIRECT)  # each write is a read of its own, however late that comes
            with subprocess.Popen(list(map(str, command)), stdout=there, stderr=subprocess.DEVNULL,
                                  env=os.environ | {"OMP_NUM_THREADS": "1", "UPMOE_PYTHON": sys.executable}) as program:
                os.close(there)
                parts = list(iter(lambda: os.read(here, 1 << 16), b""))
                os.close(here)
            self.assertEqual(program.returncode, 0)
            self.assertGreater(b"".join(parts).count(between.encode()), 1400)
            self.assertGreater(len(parts), 1400, between)
            self.write_tokenizer()

    def test_a_reader_that_has_enough(self):
        command = f"'{BINARY}' generate '{self.model}' --tokens 3 --max-new-tokens 50 --ignore-eos | head -c 3"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False,
                              timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_ranks_that_met_other_models(self):
        hosts = [self.folder / name for name in ("host0", "host1")]
        for host in hosts:
            shutil.copytree(self.model, host / "model")
        (hosts[1] / "model/generation_config.json").write_text('{"eos_token_id": 7}')
        arguments = ("generate", "model", "--tokens", "1,2", "--max-new-tokens", 2)
        self.refused_apart("different tokens that end a text: rank 0 differs from rank 1 (rank 0 has", *arguments)
        config = hosts[1] / "model/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-4}))
        self.refused_apart("different copies of model: rank 0 differs from rank 1 (rank 0 has", *arguments)
        self.refused_apart("different copies of model: rank 0 differs from rank 1 (rank 0 has", "generate", "model",
                           "--bench", "--in", 2, "--out", 2, "--rounds", 1, "--concurrency", 1)

    def test_what_is_refused(self):
        model = self.model
        self.refused(2, ["one of --prompt TEXT, --tokens 1,2,3 and --batch FILE"], "generate", model)
        self.refused(2, ["one of"], "generate", model, "--tokens", "1", "--prompt", "x")
        self.refused(2, ["--top-p"], "generate", model, "--tokens", "1", "--top-p", "0")
        self.refused(2, ["--temperature"], "generate", model, "--tokens", "1", "--temperature", "nan")
        self.refused(2, ["--rows: found '0', expected a number above 0;"], "generate", model, "--tokens", "1", "--rows",
                     "0")
        for option, value in (("--temperature", "-1"), ("--temperature", "inf"), ("--seed", "-1"), ("--seed", "")):
            self.refused(2, [f"{option}: found '{value}', expected a number of 0 or above;"], "generate", model,
                         "--tokens", "1", option, value)
        self.refused(2, ["--tokens: found ''"], "generate", model, "--tokens", "")
        self.refused(2, ["--chat lays out text", "--prompt"], "generate", model, "--tokens", "1", "--chat")
        self.refused(2, ["--tp 2 does not divide the 1 ranks"], "generate", model, "--tokens", "1", "--tp", "2")
        self.refused(3, ["no tokenizer.json", "--tokens 1,2,3"], "generate", model, "--prompt", "x")
        self.refused(3, ["token 101 is none of the model's 101 tokens"], "generate", model, "--tokens", "5,101")
        self.refused(3, ["65 tokens", "positions for 64"], "generate", model, "--tokens", ",".join(["1"] * 65))
        for line, words in (('{"tokens": []}', "prompt 0 has no tokens"), ('{"words": 1}', "line 1"),
                            ('{"tokens": [1.5]}', "tokens"), ("[1]", "line 1"), ("", "no prompts"),
                            ('{"messages": "hi"}', "line 1: messages: expected a list of turns"),
                            ('{"messages": []}', "list of turns"), ('{"messages": ["hi"]}', "list of turns"),
                            ('{"messages": [{"role": "user"}]}', "list of turns"),
                            ('{"messages": [{"role": "user", "content": 5}]}', "list of turns")):
            self.refused(3, [words], "generate", model, "--batch", self.write_batch(line))
        (model / "tokenizer.json").write_text("{}")
        with mock.patch.dict("os.environ", UPMOE_PYTHON=sys.executable):
            self.refused(3, ["not a Hugging Face tokenizer.json"], "generate", model, "--prompt", "x")


if __name__ == "__main__":
    unittest.main()
