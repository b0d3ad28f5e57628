#!/usr/bin/env python3
"""launch/write_gguf.py: names, shapes and values of what llama.cpp is given, what is refused. Without gguf itself."""

import json
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "launch"))
import write_gguf  # noqa: E402
from command_line import BadInput  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"


class Recorder:
    """What a gguf.GGUFWriter would be told."""

    def __init__(self, architecture):
        self.architecture, self.keys, self.tensors = architecture, {}, {}

    def add_tensor(self, name, values):
        assert name not in self.tensors, name
        self.tensors[name] = values

    def __getattr__(self, name):
        kind = name.removeprefix("add_")
        if kind not in ("uint32", "float32", "string", "bool", "array"):
            raise AttributeError(name)
        return lambda key, value: self.keys.__setitem__(key, (kind, value))


class GgufTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def model(self, golden, **changes):
        config = json.loads((GOLDEN / golden / "config.json").read_text(encoding="utf-8")) | changes
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shutil.copy(GOLDEN / f"{golden}.safetensors", self.folder / "model.safetensors")
        return config

    def written(self):
        return write_gguf.fill(Recorder, self.folder)

    def test_a_mixture(self):
        config = self.model("moe_odd")
        made = self.written()
        self.assertEqual(made.architecture, "qwen2moe")
        hidden, experts, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
        shared, vocab, kv = config["shared_expert_intermediate_size"], config["vocab_size"], 14
        shapes = {"token_embd.weight": (vocab, hidden), "output.weight": (vocab, hidden),
                  "output_norm.weight": (hidden,)}
        for layer in range(config["num_hidden_layers"]):
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in {
                "attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,),
                "attn_q.weight": (hidden, hidden), "attn_q.bias": (hidden,), "attn_k.weight": (kv, hidden),
                "attn_k.bias": (kv,), "attn_v.weight": (kv, hidden), "attn_v.bias": (kv,),
                "attn_output.weight": (hidden, hidden), "ffn_gate_inp.weight": (experts, hidden),
                "ffn_gate_inp_shexp.weight": (hidden,), "ffn_gate_shexp.weight": (shared, hidden),
                "ffn_up_shexp.weight": (shared, hidden), "ffn_down_shexp.weight": (hidden, shared),
                "ffn_gate_exps.weight": (experts, width, hidden), "ffn_up_exps.weight": (experts, width, hidden),
                "ffn_down_exps.weight": (experts, hidden, width)}.items()}
        self.assertEqual({name: values.shape for name, values in made.tensors.items()}, shapes)
        self.assertEqual({str(values.dtype) for values in made.tensors.values()}, {"float32"})
        keys = {key.removeprefix("qwen2moe."): value for key, (_, value) in made.keys.items()}
        self.assertEqual([keys[key] for key in (
            "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "expert_count",
            "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length", "rope.freq_base")],
            [2, 42, 3, 1, 13, 3, 28, 51, 10000.0])
        self.assertEqual(made.keys["qwen2moe.attention.layer_norm_rms_epsilon"], ("float32", 1e-6))
        self.assertEqual(keys["tokenizer.ggml.model"], "no_vocab")

    def test_values_are_those_of_the_model(self):
        self.model("moe_odd")
        made, stored = self.written(), write_gguf.Tensors(self.folder)
        for expert in (0, 12):
            np.testing.assert_array_equal(made.tensors["blk.1.ffn_up_exps.weight"][expert],
                                          stored.read(f"model.layers.1.mlp.experts.{expert}.up_proj.weight"))
        np.testing.assert_array_equal(made.tensors["blk.0.ffn_gate_inp_shexp.weight"],
                                      stored.read("model.layers.0.mlp.shared_expert_gate.weight").ravel())
        np.testing.assert_array_equal(made.tensors["output.weight"], stored.read("lm_head.weight"))

    def test_every_tensor_is_used(self):
        self.model("moe_odd")
        stored, read = write_gguf.Tensors(self.folder), set()

        class Watched(write_gguf.Tensors):
            def read(self, name):
                read.add(name)
                return super().read(name)

        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        list(write_gguf.tensors_of(Watched(self.folder), config, write_gguf.FAMILIES["qwen2_moe"]))
        self.assertEqual({name for name in stored.places if name.startswith(("model.", "lm_head."))}, read)

    def test_a_dense_model_with_tied_embeddings(self):
        config = self.model("dense_tied_gqa")
        made = self.written()
        self.assertEqual(made.architecture, "qwen2")
        np.testing.assert_array_equal(made.tensors["output.weight"], made.tensors["token_embd.weight"])
        self.assertEqual(made.tensors["blk.0.ffn_down.weight"].shape,
                         (config["hidden_size"], config["intermediate_size"]))
        self.assertNotIn("qwen2.expert_count", made.keys)

    def test_bf16_is_read(self):
        values = np.array([[1.0, -2.5], [0.15625, 3e38]], dtype="<f4")
        raw = (values.view("<u4") >> 16).astype("<u2").tobytes()
        header = json.dumps({"t": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
        (self.folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
        np.testing.assert_array_equal(write_gguf.Tensors(self.folder).read("t"),
                                      (values.view("<u4") >> 16 << 16).view("<f4"))

    def test_a_vocabulary(self):
        self.model("moe_odd", eos_token_id=[3, 4])
        (self.folder / "tokenizer.json").write_text(json.dumps({
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
            "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}, {"id": 4, "content": "own"}]}))
        keys = {key: value for key, (_, value) in self.written().keys.items()}
        self.assertEqual(keys["tokenizer.ggml.tokens"][:6], ["a", "b", "ab", "<|end|>", "own", "[PAD5]"])
        self.assertEqual(len(keys["tokenizer.ggml.tokens"]), 101)
        self.assertEqual(keys["tokenizer.ggml.token_type"][:6], [1, 1, 1, 3, 4, 5])
        self.assertEqual(keys["tokenizer.ggml.merges"], ["a b"])
        self.assertEqual((keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.bos_token_id"]), (3, 0))

    def test_what_llama_cpp_would_compute_otherwise_is_refused(self):
        for golden, changes, words in (("moe_odd", {"norm_topk_prob": True}, "norm_topk_prob"),
                                       ("moe_odd", {"mlp_only_layers": [0]}, "layers without experts"),
                                       ("moe_odd", {"shared_expert_intermediate_size": 0}, "no shared expert"),
                                       ("moe_odd", {"use_sliding_window": True}, "use_sliding_window"),
                                       ("moe_odd", {"rope_scaling": {"type": "yarn"}}, "yarn"),
                                       ("mixtral", {}, "model_type 'mixtral'")):
            self.model(golden, **changes)
            with self.assertRaises(BadInput) as caught:
                self.written()
            self.assertIn(words, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
