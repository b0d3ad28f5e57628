#!/usr/bin/env python3
"""A Hugging Face directory as one GGUF file in F32, for llama.cpp and what is built on it.

    .venv-serving/bin/python launch/write_gguf.py MODEL_DIR OUT.gguf

Families: qwen2 and qwen2_moe. What llama.cpp would compute otherwise than the model asks for is refused with words.
Without a tokenizer.json the file has no vocabulary, and tokens go in and out as numbers. Needs numpy and gguf
(launch/serving_requirements.txt).

Exit status: 0 done, 2 usage or a Python without these packages, 3 bad input or a model that llama.cpp does not take.
"""

import argparse
import json
import os
import struct
import sys
from pathlib import Path

from command_line import BadInput, end_without_package, run_tool
from whole_file import whole_file


def missing_package(error):
    return f"{sys.executable} cannot import {error.name}; launch/after_training.sh makes an environment that has it"


try:
    import numpy
except ImportError as missing:
    end_without_package("write_gguf", missing_package(missing))

# dtype of safetensors: numpy's, of which bf16 is none
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LARGEST_HEADER = 100 << 20
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens

# our layers' tensors: llama.cpp's name, whether one for each expert
_ATTENTION = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
              "self_attn.o_proj.weight": "attn_output.weight",
              **{f"self_attn.{part}_proj.{kind}": f"attn_{part}.{kind}"
                 for part in "qkv" for kind in ("weight", "bias")}}
_MATRICES = ("gate", "up", "down")
_DENSE = {f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in _MATRICES}
_SHARED = {"mlp.gate.weight": "ffn_gate_inp.weight", "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
           **{f"mlp.shared_expert.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in _MATRICES}}
_EXPERTS = {f"mlp.experts.{{}}.{part}_proj.weight": f"ffn_{part}_exps.weight" for part in _MATRICES}


class Family:
    """How a model_type lies in a GGUF file: its architecture there, names of a layer's tensors, what is refused."""

    def __init__(self, architecture, layer, experts=None):
        self.architecture, self.layer, self.experts = architecture, layer, experts or {}

    def refusals(self, config):
        if config.get("use_sliding_window"):
            yield "use_sliding_window: the window would be left out"
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            yield f"rotary positions of type '{scaling.get('rope_type', scaling.get('type'))}'"
        if not self.experts:
            return
        if config.get("norm_topk_prob"):
            yield "norm_topk_prob: llama.cpp leaves the chosen experts' weights as softmax gives them"
        if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
            yield "layers without experts among those that have them"
        if not config.get("shared_expert_intermediate_size"):
            yield "no shared expert, without which this architecture is not loaded"


FAMILIES = {"qwen2": Family("qwen2", _ATTENTION | _DENSE),
            "qwen2_moe": Family("qwen2moe", _ATTENTION | _SHARED, _EXPERTS)}


class Tensors:
    """The tensors of a model directory by name, each read as F32 when it is asked for."""

    def __init__(self, folder):
        self.places = {}
        for path in sorted(Path(folder).glob("model*.safetensors")):
            self.places |= {name: (path, *place) for name, place in self.entries(path)}
        if not self.places:
            raise BadInput(f"{folder}: has no model*.safetensors")

    @staticmethod
    def entries(path):
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            try:
                header = json.loads(file.read(min(length, LARGEST_HEADER)))
            except ValueError:
                raise BadInput(f"{path}: not a readable safetensors file") from None
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, (entry["dtype"], entry["shape"], 8 + length + entry["data_offsets"][0])

    def __contains__(self, name):
        return name in self.places

    def read(self, name):
        if name not in self.places:
            raise BadInput(f"the model has no tensor {name}")
        path, dtype, shape, offset = self.places[name]
        if dtype not in STORED:
            raise BadInput(f"{path}: {name} is of type {dtype}, expected {', '.join(STORED)}")
        count = int(numpy.prod(shape, dtype=numpy.int64))
        with open(path, "rb") as file:
            file.seek(offset)
            values = numpy.fromfile(file, STORED[dtype], count)
        if values.size != count:
            raise BadInput(f"{path}: ends within {name}")
        if dtype == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        return values.astype("<f4").reshape(shape)


def keys_of(config, family):
    """(key, kind of value, value) of what llama.cpp asks of a model's shape."""
    heads = config["num_attention_heads"]
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    arch = family.architecture
    yield "general.file_type", "uint32", 0  # F32
    for key, value in (("block_count", config["num_hidden_layers"]),
                       ("context_length", config["max_position_embeddings"]),
                       ("embedding_length", config["hidden_size"]),
                       ("feed_forward_length", config["intermediate_size"]),
                       ("vocab_size", config["vocab_size"]), ("attention.head_count", heads),
                       ("attention.head_count_kv", config.get("num_key_value_heads", heads)),
                       ("attention.key_length", head_dim), ("attention.value_length", head_dim)):
        yield f"{arch}.{key}", "uint32", value
    yield f"{arch}.attention.layer_norm_rms_epsilon", "float32", config["rms_norm_eps"]
    yield f"{arch}.rope.freq_base", "float32", theta
    if family.experts:
        for key, value in (("expert_count", config["num_experts"]),
                           ("expert_used_count", config["num_experts_per_tok"]),
                           ("expert_feed_forward_length", config["moe_intermediate_size"]),
                           ("expert_shared_feed_forward_length", config["shared_expert_intermediate_size"])):
            yield f"{arch}.{key}", "uint32", value


def vocabulary_of(folder, config):
    """(key, kind of value, value) of the tokens, their kinds and merges; of none where there is no tokenizer.json."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        yield "tokenizer.ggml.model", "string", "no_vocab"
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise BadInput(f"{path}: a tokenizer of type {model.get('type')}; only byte-level BPE is written")
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    kinds = [UNUSED] * len(tokens)
    named = [(token, i, NORMAL) for token, i in model["vocab"].items()]
    named += [(token["content"], token["id"], CONTROL if token.get("special") else USER_DEFINED)
              for token in tokenizer.get("added_tokens", [])]
    for token, i, kind in named:
        if i >= len(tokens):
            raise BadInput(f"{path}: token {i} is beyond the model's vocabulary of {len(tokens)}")
        tokens[i], kinds[i] = token, kind
    yield "tokenizer.ggml.model", "string", "gpt2"
    yield "tokenizer.ggml.pre", "string", "qwen2"
    yield "tokenizer.ggml.tokens", "array", tokens
    yield "tokenizer.ggml.token_type", "array", kinds
    yield "tokenizer.ggml.merges", "array", [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    yield "tokenizer.ggml.add_bos_token", "bool", False
    for name in ("bos", "eos"):
        token = config.get(f"{name}_token_id")
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            yield f"tokenizer.ggml.{name}_token_id", "uint32", token


def tensors_of(tensors, config, family):
    """(llama.cpp's name, values in F32), the experts of a layer as one tensor [expert, out, in]."""
    yield "token_embd.weight", tensors.read("model.embed_tokens.weight")
    yield "output_norm.weight", tensors.read("model.norm.weight")
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    yield "output.weight", tensors.read(head)
    for layer in range(config["num_hidden_layers"]):
        for ours, name in family.layer.items():
            # The shared expert's gate is one row, and a vector there.
            values = tensors.read(f"model.layers.{layer}.{ours}")
            yield f"blk.{layer}.{name}", values[0] if ours == "mlp.shared_expert_gate.weight" else values
        for ours, name in family.experts.items():
            yield f"blk.{layer}.{name}", numpy.stack([tensors.read(f"model.layers.{layer}.{ours.format(expert)}")
                                                      for expert in range(config["num_experts"])])


def fill(writer_of, folder):
    """Hands everything of a model to the writer that writer_of(architecture) gives, and returns it."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise BadInput(f"{path}: not valid JSON: {e}") from None
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise BadInput(f"{path}: model_type '{config.get('model_type')}' is not written as GGUF, only "
                       f"{', '.join(FAMILIES)} are")
    refusals = list(family.refusals(config))
    if refusals:
        raise BadInput(f"{path}: llama.cpp does not take this model: {'; '.join(refusals)}")
    writer = writer_of(family.architecture)
    for key, kind, value in (*keys_of(config, family), *vocabulary_of(folder, config)):
        getattr(writer, f"add_{kind}")(key, value)
    for name, values in tensors_of(Tensors(folder), config, family):
        writer.add_tensor(name, values)
    return writer


def main():
    parser = argparse.ArgumentParser(prog="write_gguf.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("out", metavar="OUT.gguf")
    args = parser.parse_args()
    try:
        import gguf
    except ImportError as e:
        end_without_package("write_gguf", missing_package(e))
    with whole_file(args.out) as part:
        writer = fill(lambda architecture: gguf.GGUFWriter(part, architecture), args.model)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    print(f"{args.out}: {os.path.getsize(args.out)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("write_gguf", main))
