"""Tools that launch/after_training.sh starts, pretended: programs and modules of Python, for serving_test.py."""

import sys

TOKENS = [7, 7, 3, 9]

UPMOE = f"""#!/bin/sh
echo '{{"tokens": {TOKENS}, "text": null, "tokens_per_s": 1.0}}'
"""

# Makes environments of itself; one package does not install.
PYTHON = f"""#!/bin/bash
case "$1 $2" in
  "-V "*) echo Python 3.11.2 ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip" | "launch/pip_without_labels.py "*)
    echo "pretending: $*"
    [[ "$*" != *$BROKEN* ]] || {{ echo "ERROR: no such version"; exit 1; }} ;;
  *) exec {sys.executable} "$@" ;;
esac
"""

GGUF = """
class GGUFWriter:
    def __init__(self, path, architecture):
        self.path, self.names = path, []
    def __getattr__(self, name):
        return lambda *arguments: None
    def add_tensor(self, name, values):
        self.names.append(name)
    def write_tensors_to_file(self):
        open(self.path, "w").write("\\n".join(self.names))
class GGUFReader:
    def __init__(self, path):
        self.tensors = open(path).read().split("\\n")
"""

LLAMA = """
import itertools, os
class Llama:
    def __init__(self, model_path, **options):
        assert open(model_path).read()
    def generate(self, prompt, **options):
        if os.environ.get("DIES"):
            print("ggml says goodbye", flush=True)
            os._exit(9)
        return itertools.chain(map(int, os.environ["ANSWER"].split(",")), itertools.repeat(0))
"""

# Asked once whether it is well, it answers one question.
VLLM = """
import http.server, json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        assert self.path == "/health"
        self.answer({})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["model"], asked["temperature"]) == ("/v1/completions", "upmoe", 0)
        self.answer({"choices": [{"token_ids": [int(t) for t in os.environ["ANSWER"].split(",")]}]})
if os.environ.get("DIES"):
    print("WARNING: this can cause OSError: too many files\\noptions: trust_remote_code=False", flush=True)
    sys.exit(os.environ["DIES"])
http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""

# Reads the task's file from where it is, as the real one does.
LM_EVAL = """
import os, sys, types
def simple_evaluate(tasks, **options):
    task = open(os.path.join(options["task_manager"], tasks[0] + ".yaml")).read()
    name = task.split("test: ")[1].split()[0]
    return {"n-samples": {tasks[0]: {"effective": len(open(name).readlines())}},
            "results": {tasks[0]: {"acc,none": 0.25, "acc_norm,none": 0.5}}}
sys.modules["lm_eval.tasks"] = types.SimpleNamespace(TaskManager=lambda include_path: include_path)
"""

TRANSFORMERS = """
CONFIG_MAPPING = {"qwen2_moe": None}
class PreTrainedTokenizerFast:
    def __init__(self, tokenizer_file):
        open(tokenizer_file)
    def convert_ids_to_tokens(self, token):
        return str(token)
"""

# Where each lies in a folder that is searched for programs and modules.
TOOLS = {"upmoe": UPMOE, "python": PYTHON, "gguf.py": GGUF, "llama_cpp.py": LLAMA, "lm_eval/__init__.py": LM_EVAL,
         "transformers.py": TRANSFORMERS, "vllm/entrypoints/openai/api_server.py": VLLM}
