#!/usr/bin/env python3
"""A Hugging Face directory as one GGUF file in F32, for llama.cpp and what is built on it.

    .venv-serving/bin/python launch/write_gguf.py MODEL_DIR OUT.gguf

Families: those of launch/gguf_families.py. What llama.cpp would compute otherwise than the model asks for is refused
with words. Without a tokenizer.json the file has no vocabulary, and tokens go in and out as numbers. Needs numpy and
gguf (launch/serving_requirements.txt).

Exit status: 0 done, 2 usage or a Python without these packages, 3 bad input or a model that llama.cpp does not take.
"""

import argparse
import json
import os
import struct
import sys
from pathlib import Path

from command_line import BadInput, ToolParser, end_without_package, run_tool
from gguf_families import family_of, heads_of
from hf_config import add_common_names
from whole_file import whole_file

sys.path.append(str(Path(__file__).resolve().parent.parent / "data"))
from chat_template import settings_of, templates_of  # noqa: E402


def missing_package(error):
    return f"{sys.executable} cannot import {error.name}; launch/after_training.sh makes an environment that has it"


try:
    import numpy
except ImportError as missing:
    end_without_package("write_gguf", missing_package(missing))

# dtype of safetensors: numpy's, of which bf16 is none
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LARGEST_HEADER = 100 << 20
MODEL_TENSORS = ("model.", "lm_head.", "transformer.")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
# How text is cut before merges, as tokenizer.json says it: llama.cpp's name. By it llama.cpp knows whether merges are
# ignored where a whole piece is a token, and so does tokenizer.json.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {(_WORDS + r"\p{N}" + _REST, False): "qwen2", (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe"}


class Entries(dict):
    """A map of a JSON file; a key that it lacks is told as a fault of that file."""

    def __init__(self, found, path):
        super().__init__(found)
        self.path = path

    def __missing__(self, key):
        raise BadInput(f"{self.path}: lacks '{key}', which every model that upmoe exports has")


def read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda entries: Entries(entries, path))
    except ValueError as e:
        raise BadInput(f"{path}: not valid JSON: {e}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: expected a map of keys")
    return found


class Tensors:
    """The tensors of a model directory by name, each read as F32 when it is asked for."""

    def __init__(self, folder):
        self.places, self.taken = {}, set()
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
        self.taken.add(name)
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
    heads, key_heads, head_dim = heads_of(config)
    yield "general.file_type", "uint32", 0  # F32
    for key, kind, value in (("block_count", "uint32", config["num_hidden_layers"]),
                             ("context_length", "uint32", config["max_position_embeddings"]),
                             ("embedding_length", "uint32", config["hidden_size"]),
                             ("feed_forward_length", "uint32", config["intermediate_size"]),
                             ("vocab_size", "uint32", config["vocab_size"]), ("attention.head_count", "uint32", heads),
                             ("attention.head_count_kv", "uint32", key_heads),
                             ("attention.key_length", "uint32", head_dim),
                             ("attention.value_length", "uint32", head_dim),
                             ("rope.dimension_count", "uint32", head_dim),
                             ("rope.freq_base", "float32", config["rope_theta"]),
                             *family.norm_keys(config), *family.keys(config)):
        yield f"{family.architecture}.{key}", kind, value


def cut_of(tokenizer, path):
    """llama.cpp's name of how the text is cut."""
    steps = tokenizer.get("pre_tokenizer") or {}
    steps, pattern = steps.get("pretokenizers", [steps]), None
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"]:
        split, to_bytes = steps
        # Left out, use_regex cuts once more, and a space is put in front.
        whole = not to_bytes.get("use_regex", True) and not to_bytes.get("add_prefix_space", True)
        if whole and split.get("behavior") == "Isolated" and not split.get("invert"):
            pattern = split.get("pattern", {}).get("Regex")
    cut = CUTS.get((pattern, bool(tokenizer["model"].get("ignore_merges"))))
    if cut is None:
        raise BadInput(f"{path}: cuts text as none of {', '.join(CUTS.values())} does; without tokenizer.json beside "
                       "the model the file has no vocabulary")
    return cut


def put_around(tokenizer):
    """The tokens that tokenizer.json puts before a text and behind it, None of none."""
    step = tokenizer.get("post_processor") or {}
    around = {}
    for one in step.get("processors", [step]):
        parts = one.get("single", []) if one.get("type") == "TemplateProcessing" else []
        for side, part in (("bos", parts[:1]), ("eos", parts[-1:])):
            for named in (p["SpecialToken"]["id"] for p in part if "SpecialToken" in p):
                around[side] = one["special_tokens"][named]["ids"][0]
    return around.get("bos"), around.get("eos")


def vocabulary_of(folder, config):
    """(key, kind of value, value) of the tokens, their kinds and merges; of none where there is no tokenizer.json."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        yield "tokenizer.ggml.model", "string", "no_vocab"
        return
    tokenizer = read_json(path)
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
    yield "tokenizer.ggml.pre", "string", cut_of(tokenizer, path)
    yield "tokenizer.ggml.tokens", "array", tokens
    yield "tokenizer.ggml.token_type", "array", kinds
    yield "tokenizer.ggml.merges", "array", [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    # A text begins and ends as the tokenizer has it, whatever llama.cpp's own habit with its kind is.
    for name, put in zip(("bos", "eos"), put_around(tokenizer), strict=True):
        yield f"tokenizer.ggml.add_{name}_token", "bool", put is not None
        token = config.get(f"{name}_token_id") if put is None else put
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            yield f"tokenizer.ggml.{name}_token_id", "uint32", token
    template = templates_of(path.parent, settings_of(path.parent / "tokenizer_config.json")).get("default")
    if isinstance(template, str):
        yield "tokenizer.chat_template", "string", template


def layer_tensors(tensors, config, family, layer):
    """(llama.cpp's name, values) of a layer, the experts' as one tensor [expert, out, in]."""
    place = family.layers.format(layer)
    for ours, name in family.layer_names(config, layer).items():
        if ours not in family.optional or place + ours in tensors:
            yield name, family.values(config, ours, tensors.read(place + ours))
    for ours, name in family.expert_names(config, layer).items():
        yield name, numpy.stack([tensors.read(place + ours.format(expert))
                                 for expert in range(family.expert_count(config))])


def tensors_of(tensors, config, family):
    """(llama.cpp's name, values in F32) of every tensor; one that has no place there is refused."""
    yield "token_embd.weight", tensors.read(family.embedding)
    yield "output_norm.weight", family.values(config, family.norm, tensors.read(family.norm))
    if family.head(config) is not None:
        yield "output.weight", tensors.read(family.head(config))
    for layer in range(config["num_hidden_layers"]):
        for name, values in layer_tensors(tensors, config, family, layer):
            yield f"blk.{layer}.{name}", values
    left = sorted(name for name in tensors.places if name.startswith(MODEL_TENSORS) and name not in tensors.taken)
    if left:
        raise BadInput(f"llama.cpp does not take this model: {len(left)} of its tensors have no place there, such as "
                       f"{left[0]}")


def fill(writer_of, folder):
    """Hands everything of a model to the writer that writer_of(architecture) gives, and returns it."""
    path = Path(folder) / "config.json"
    config = add_common_names(read_json(path))
    family = family_of(config, path)
    writer = writer_of(family.architecture)
    for key, kind, value in (*keys_of(config, family), *vocabulary_of(folder, config)):
        getattr(writer, f"add_{kind}")(key, value)
    for name, values in tensors_of(Tensors(folder), config, family):
        writer.add_tensor(name, values)
    return writer


def main():
    parser = ToolParser(prog="write_gguf.py", description=__doc__,
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
