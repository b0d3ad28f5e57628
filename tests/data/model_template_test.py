#!/usr/bin/env python3
"""data/tokenize.py --chat --template model: conversations as a model's own chat template lays them out."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import pyarrow
import pyarrow.parquet
import tokenizers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path += [str(ROOT / "tests/support")]
import chat_templates  # noqa: E402
from chat_templates import CALL, CALLING, TALK, THINKING, TOOLS  # noqa: E402
from tokenize_case import TokenizeCase  # noqa: E402


class ModelTemplateTest(TokenizeCase):
    TEXT = "one two three four five six seven\nI think user assistant\n"

    def model(self, kind, **settings):
        """A folder with the tokenizer, template and stop of this kind."""
        template, controls, stop = chat_templates.TEMPLATES[kind]
        folder = Path(tempfile.mkdtemp(dir=self.dir))
        tokenizer = tokenizers.Tokenizer.from_file(str(self.plain))
        chat_templates.add_controls(tokenizer, controls)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"chat_template": template, "eos_token": stop, "bos_token": {"content": chat_templates.BEGIN}} | settings))
        return folder

    def tokenize(self, model, records, *options):
        source = self.dir / "talks.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        return self.tokenize_file(model, source, *options)

    def tokenize_file(self, model, source, *options):
        return self.run_script("--tokenizer", model, "--out", self.dir / "out.h5", "--chat", "--template", "model",
                               source, *options)

    def read(self, model):
        """The tokens, which of them count, and texts of both."""
        with h5py.File(self.dir / "out.h5") as file:
            tokens, mask = file["tokens"][:], file["loss_mask"][:]
        decode = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).decode
        return tokens.tolist(), mask.tolist(), *(decode(ids.tolist(), skip_special_tokens=False)
                                                 for ids in (tokens, tokens[mask == 1]))

    def spelt(self, model, record, *options):
        """(text of the whole file, text of what counts)"""
        done = self.tokenize(model, [record], *options)
        self.assertEqual(done.returncode, 0, done.stderr)
        return self.read(model)[2:]

    def test_what_templates_lay_out(self):
        system = "<|im_start|>system\nBe kind.<|im_end|>\n"
        tools = f"<|im_start|>system\n{json.dumps(TOOLS[0])}<|im_end|>\n"
        call = '<call>add({"a": 2, "b": 2})</call><|im_end|>'
        for kind, record, whole, counted in (
                ("headers", {"messages": TALK},
                 "<|begin|>" + "".join(f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content']}"
                                       "<|eot_id|>" for turn in TALK), "four<|eot_id|>seven, I think<|eot_id|>"),
                ("marked", {"messages": TALK}, system + chatml(TALK) + "\n", "four<|im_end|>seven, I think<|im_end|>"),
                ("brackets", {"messages": TALK},
                 "<|begin|>[INST] two and two?[/INST] four</s>[INST] and three?[/INST] seven, I think</s>",
                 " four</s> seven, I think</s>"),
                ("thoughts", {"messages": THINKING}, chatml([*TALK[:3], THINKING[3]]) + "\n",
                 "four<|im_end|><think>hm</think>\n\nseven, I think<|im_end|>"),
                ("calls", {"messages": CALLING, "tools": TOOLS},
                 f"{tools}{chatml(TALK[:1])}\n<|im_start|>assistant\n{call}\n<|im_start|>tool\n4<|im_end|>\n"
                 f"{chatml(TALK[1:2])}\n", f"{call}four<|im_end|>"),
                ("taking", {"messages": TALK},
                 "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in TALK),
                 "four<|end|>seven, I think<|end|>"),
                ("open", {"messages": TALK}, "Q: two and two?\nA: four</s>Q: and three?\nA: seven, I think",
                 " four</s> seven, I think<|endoftext|>")):
            with self.subTest(kind):
                self.assertEqual(self.spelt(self.model(kind), record), (whole + "<|endoftext|>", counted))

    def test_prompts_are_those_that_the_model_will_be_asked_with(self):
        for kind in ("headers", "marked", "brackets", "thoughts", "taking", "marks"):
            model = self.model(kind)
            self.spelt(model, {"messages": TALK})
            tokens, mask = self.read(model)[:2]
            begins = [i for i, counts in enumerate(mask) if counts and not mask[i - 1]]
            asked = [json.dumps({"chat": {"messages": TALK[:i]}}) for i in (1, 3)]
            done = subprocess.run([sys.executable, str(ROOT / "data/text_codec.py"), str(model / "tokenizer.json")],
                                  input="\n".join(asked), text=True, capture_output=True, timeout=60, check=True)
            self.assertEqual([tokens[:begin] for begin in begins],
                             [json.loads(line)["tokens"] for line in done.stdout.splitlines()], kind)

    def test_stops_that_the_models_folder_names(self):
        model = self.model("marked", eos_token=None)
        done = self.tokenize(model, [{"messages": TALK}])
        self.assertEqual(done.returncode, 3)
        self.assertIn("names a token of the tokenizer at which an answer ends", done.stderr)
        end = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_end|>")
        for name, ids in (("config.json", end), ("generation_config.json", [0, end])):
            (model / name).write_text(json.dumps({"eos_token_id": ids}))
            self.assertEqual(self.spelt(model, {"messages": TALK})[1], "four<|im_end|>seven, I think<|im_end|>")
            (model / name).unlink()

    def test_weights_and_calls_whose_arguments_are_texts(self):
        model = self.model("calls")
        as_text = {"function": dict(CALL["function"], arguments=json.dumps(CALL["function"]["arguments"]))}
        talk = [CALLING[0], {"role": "assistant", "content": None, "tool_calls": [as_text]}, *CALLING[2:]]
        whole = self.spelt(model, {"messages": CALLING, "tools": TOOLS})
        self.assertEqual(self.spelt(model, {"messages": talk, "tools": TOOLS}), whole)
        talk[1]["weight"] = 0
        self.assertEqual(self.spelt(model, {"messages": talk, "tools": json.dumps(TOOLS)}),
                         (whole[0], "four<|im_end|>"))

    def test_a_template_of_its_own_for_tools(self):
        plain, tools = "{{ messages[0].content }}<|im_end|>", chat_templates.CALLS
        model = self.model("calls", chat_template=[{"name": "default", "template": plain},
                                                   {"name": "tool_use", "template": tools}])
        record = {"messages": CALLING, "tools": TOOLS}
        whole = self.spelt(model, record)
        self.assertIn("<call>", whole[1])
        (model / "chat_template.jinja").write_text(plain)
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(tools)
        (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
        self.assertEqual(self.spelt(model, record), whole)

    def test_tables(self):
        model = self.model("calls")
        talk = [dict({"tool_calls": None}, **turn) for turn in TALK]
        expected = self.spelt(model, {"messages": TALK, "tools": TOOLS})
        for tools in (TOOLS, json.dumps(TOOLS)):
            table = self.dir / "talks.parquet"
            pyarrow.parquet.write_table(pyarrow.table({"messages": [talk], "tools": [tools], "id": [1]}), table)
            done = self.tokenize_file(model, table)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(self.read(model)[2:], expected)

    def test_same_bytes_for_any_number_of_processes(self):
        model, outcomes = self.model("headers"), []
        for processes in (1, 3):
            done = self.tokenize(model, [{"messages": TALK}] * 40, "--processes", processes)
            self.assertEqual(done.returncode, 0, done.stderr)
            outcomes.append((self.dir / "out.h5").read_bytes())
        self.assertEqual(*outcomes)

    def test_control_tokens_in_contents(self):
        model = self.model("marked")
        for turn, words in ((0, "turn 0 spells the control token <|im_end|>"), (1, "turn 1 spells")):
            talk = [dict(TALK[i], content="a <|im_end|> b") if i == turn else TALK[i] for i in range(2)]
            done = self.tokenize(model, [{"messages": TALK}, {"messages": talk}])
            self.assertEqual(done.returncode, 3)
            self.assertIn(f"talks.jsonl:2: {words}", done.stderr)
        done = self.tokenize(model, [{"messages": TALK, "tools": [{"name": "<|im_start|>"}]}])
        self.assertIn("'tools' spell the control token <|im_start|>", done.stderr)
        talk = [dict(TALK[0], content="a <|im_start|> b"), TALK[1]]
        self.spelt(model, {"messages": talk}, "--parse-special")
        self.assertEqual(self.read(model)[0].count(
            tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_start|>")), 4)

    def test_refusals(self):
        self.assertIn("no chat template", self.refused(self.model("marked", chat_template=None), {"messages": TALK}))
        words = self.refused(self.model("brackets"), {"messages": [{"role": "system", "content": "a"}, *TALK]})
        self.assertIn("talks.jsonl:1: ", words)
        self.assertIn("its chat template refuses: user and assistant take turns", words)
        # The generation's prompt is not how the answer is laid out.
        asks = chat_templates.MARKED.replace("{{ '<|im_start|>assistant\\n' }}{% endif",
                                             "{{ '<|im_start|>assistant\\n<think>' }}{% endif")
        words = self.refused(self.model("marked", chat_template=asks), {"messages": TALK})
        self.assertIn("lays out what stands before turn 1 otherwise in the whole conversation", words)
        # Of an answer that does not count nobody needs to know where it begins.
        self.assertEqual(self.spelt(self.model("marked", chat_template=asks), {"messages": [
            TALK[0], dict(TALK[1], weight=0), TALK[2], dict(TALK[3], content="<think>hm")]})[1], "hm<|im_end|>")
        words = self.refused(self.model("calls", chat_template="{{ messages[5].content }}"), {"messages": TALK})
        self.assertIn("refuses", words)
        for wrong, said in (([{"role": ["user"], "content": "a"}], "expected a text as 'role'"),
                            ([{"role": "user"}], "with 'role' and 'content', its keys are: role"),
                            ([{"role": "assistant", "content": None}], "content of turn 0"),
                            (TALK[:1], "no turn of the assistant that counts")):
            self.assertIn(said, self.refused(self.model("marked"), {"messages": wrong}))
        self.assertIn("expected a list of tools", self.refused(self.model("calls"), {"messages": TALK, "tools": 3}))
        done = self.tokenize(self.model("headers"), [{"messages": TALK}], "--bos", "<|begin|>")
        self.assertEqual(done.returncode, 2)
        self.assertIn("leave --bos out", done.stderr)

    def test_an_answer_ends_where_it_ends_alone(self):
        """And not at the end of another's turn, which would be learned."""
        model = self.model("marked", eos_token="<|endoftext|>")
        for talk in (TALK, TALK[:3], TALK[:2]):
            words = self.refused(model, {"messages": talk})
            self.assertIn("turn 1 ends with none of the tokens at which generation ends (<|endoftext|>)", words)
            self.assertIn("behind its beginning stand <|im_end|>", words)
        # Calls end otherwise than answers, and both are named.
        ends = chat_templates.CALLS.replace("'</call>' }}\n{%- endfor %}{{ '<|im_end|>\\n' }}",
                                            "'</call>' }}\n{%- endfor %}{{ '<|im_end|>\\n' if not message.tool_calls "
                                            "else '<|im_start|>' }}")
        self.assertNotEqual(ends, chat_templates.CALLS)
        record = {"messages": CALLING, "tools": TOOLS}
        model = self.model("calls", chat_template=ends)
        self.assertIn("behind its beginning stand <|im_start|>", self.refused(model, record))
        numbers = [tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(name)
                   for name in ("<|im_start|>", "<|im_end|>")]
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": numbers}))
        self.assertEqual(self.spelt(model, record)[1], '<call>add({"a": 2, "b": 2})</call><|im_start|>four<|im_end|>')
        # A template that closes whatever it is given.
        always = chat_templates.MARKED + "{{ '<|endoftext|>' if not add_generation_prompt }}"
        model = self.model("marked", chat_template=always, eos_token="<|endoftext|>")
        self.assertIn("turn 1 ends with none of the tokens", self.refused(model, {"messages": TALK[:3]}))
        # The next speaker's mark is what ends an answer.
        marks = ("{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else '<|im_end|>') + m.content }}"
                 "{% endfor %}{{ '<|im_end|>' if add_generation_prompt }}")
        model = self.model("marked", chat_template=marks, eos_token="<|im_start|>")
        self.assertEqual(self.spelt(model, {"messages": TALK})[1], "four<|im_start|>seven, I think<|endoftext|>")

    def test_what_a_turn_says_is_not_lost(self):
        calls, marked = self.model("calls"), self.model("marked")
        record = {"messages": CALLING, "tools": TOOLS}
        said = self.spelt(calls, record)[1]
        # None of a content is none, and a template that writes its arguments as they are gets them so.
        raw = chat_templates.CALLS.replace("message.content or ''", "message.content").replace("arguments | tojson",
                                                                                               "arguments")
        text = dict(CALL, function={"name": "add", "arguments": '{"a": 2, "b": 2}'})
        for content in ({}, {"content": None}):
            talk = [CALLING[0], {"role": "assistant", "tool_calls": [text]} | content, *CALLING[2:]]
            self.assertEqual(self.spelt(self.model("calls", chat_template=raw), {"messages": talk, "tools": TOOLS})[1],
                             said)
        # Under whichever name what was thought stands.
        thinks = "{% for m in messages %}{{ (m.thinking or '') + m.content + '<|im_end|>' }}{% endfor %}"
        for name in ("reasoning", "thinking", "reasoning_content"):
            talk = [TALK[0], TALK[1] | {name: "hm, "}]
            self.assertEqual(self.spelt(self.model("marked", chat_template=thinks), {"messages": talk})[1],
                             "hm, four<|im_end|>")
        self.assertIn("turn 1: calls add, for which the chat template has no form", self.refused(
            self.model("calls", chat_template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"),
            {"messages": CALLING}))
        silent = "{% for m in messages %}{{ m.content if m.role == 'user' }}{{ '<|im_end|>' }}{% endfor %}"
        self.assertIn("turn 1: nothing of its content is left",
                      self.refused(self.model("marked", chat_template=silent), {"messages": TALK}))
        done = self.tokenize(marked, [{"messages": TALK, "tools": TOOLS}])
        self.assertIn("--template model has no place for: tools (1)", done.stderr)
        # Tables have an empty text where there are no tools.
        self.assertEqual(self.spelt(calls, {"messages": TALK, "tools": " "}), self.spelt(calls, {"messages": TALK}))
        self.assertIn("'tools': a text that is no JSON", self.refused(calls, {"messages": TALK, "tools": "None"}))

    def test_a_conversation_that_the_assistant_begins(self):
        first = chat_templates.MARKED
        model, talk = self.model("marked", chat_template=first), [TALK[1], *TALK]
        self.assertIn("what stands before turn 0, where it has to begin", self.refused(model, {"messages": talk}))
        talk[0] = dict(talk[0], weight=0)
        self.assertEqual(self.spelt(model, {"messages": talk})[1], "four<|im_end|>seven, I think<|im_end|>")

    def test_special_tokens_of_a_folder(self):
        shows = "{{ bos_token is defined }} {{ sep_token }} {{ image_token }}{% for m in messages %}{{ m.content }}" \
                "{{ '<|im_end|>' }}{% endfor %}"
        model = self.model("marked", chat_template=shows, bos_token=None, eos_token=None, sep_token={"content": "sep"},
                           extra_special_tokens={"image_token": "img"})
        (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
        self.assertEqual(self.spelt(model, {"messages": TALK[:2]})[0],
                         "False sep imgtwo and two?<|im_end|>four<|im_end|><|endoftext|>")
        # Of models that have more than text; and tokens that this file alone calls special.
        model = self.model("marked", eos_token=None, additional_special_tokens=["three"])
        end = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_end|>")
        (model / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": end}}))
        self.assertEqual(self.spelt(model, {"messages": TALK[:2]})[1], "four<|im_end|>")
        tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.add_tokens(["three"])
        tokenizer.save(str(model / "tokenizer.json"))
        self.assertIn("turn 2 spells the control token three", self.refused(model, {"messages": TALK}))

    def test_files_that_are_not_what_they_should_be(self):
        for settings, words in (({"eos_token": 5}, "eos_token: expected a token's text, found 5"),
                                ({"eos_token": ["a"]}, "expected a token's text"),
                                ({"bos_token": {"content": 3}}, "bos_token: expected a token's text"),
                                ({"chat_template": [{"name": ["a"]}]}, "chat_template: expected a text, or objects"),
                                ({"chat_template": ["a"]}, "chat_template: expected a text, or objects"),
                                ({"chat_template": 3}, "no chat template"),
                                ({"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "refuses")):
            self.assertIn(words, self.refused(self.model("marked", **settings), {"messages": TALK}))
        for wrong in (-1, [1, -1], 2**40, True, "301", [[301]]):
            model = self.model("marked")
            (model / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
            self.assertIn("eos_token_id: expected the number of a token", self.refused(model, {"messages": TALK}))
        for content, words in (("[" * 100_000, "not JSON"), ("[1]", "expected a JSON object")):
            model = self.model("marked")
            (model / "config.json").write_text(content)
            self.assertIn(words, self.refused(model, {"messages": TALK}))
        deep = TALK[0] | {"x": json.loads("[" * 900 + "]" * 900)}
        self.assertIn("talks.jsonl:1: nested too deeply", self.refused(self.model("marked"),
                                                                      {"messages": [deep, TALK[1]]}))

    def refused(self, model, record):
        done = self.tokenize(model, [record])
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done.stderr


def chatml(turns):
    """Without the end of its last line."""
    return "\n".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>" for turn in turns)


if __name__ == "__main__":
    unittest.main()
