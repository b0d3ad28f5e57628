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
import gguf_families  # noqa: E402
import write_gguf  # noqa: E402
from command_line import BadInput  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
QWEN2_CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
             r"\s*[\r\n]+|\s+(?!\S)|\s+")


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


class GgufFolder(unittest.TestCase):
    """A folder with one of the saved models in it."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def model(self, golden, **changes):
        config = json.loads((GOLDEN / golden / "config.json").read_text(encoding="utf-8")) | changes
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shutil.copy(GOLDEN / f"{golden}.safetensors", self.folder / "model.safetensors")
        return config

    @staticmethod
    def dbrx(**changes):
        """Changes of keys in the maps of dbrx's config.json."""
        config = json.loads((GOLDEN / "dbrx" / "config.json").read_text(encoding="utf-8"))
        return {part: config[part] | {key: value for key, value in changes.items()
                                      if (key == "clip_qkv") == (part == "attn_config")}
                for part in ("attn_config", "ffn_config")}

    def written(self):
        return write_gguf.fill(Recorder, self.folder)


class GgufTest(GgufFolder):
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

    def test_a_tensor_without_a_place_is_refused(self):
        self.model("moe_odd", num_hidden_layers=1)  # layer 1 of the file is left
        with self.assertRaises(BadInput) as caught:
            self.written()
        self.assertIn("such as model.layers.1.", str(caught.exception))

    def test_a_configuration_is_not_taken_at_its_word(self):
        config = self.model("moe_odd")
        for key in ("num_hidden_layers", "vocab_size", "rms_norm_eps"):
            lacking = {name: value for name, value in config.items() if name != key}
            (self.folder / "config.json").write_text(json.dumps(lacking), encoding="utf-8")
            with self.assertRaisesRegex(BadInput, f"config.json: lacks '{key}'"):
                self.written()
        for text, words in (("[1]", "expected a map of keys"), ("{", "not valid JSON")):
            (self.folder / "config.json").write_text(text, encoding="utf-8")
            with self.assertRaisesRegex(BadInput, f"config.json: {words}"):
                self.written()

    def test_the_base_of_positions_is_taken_from_where_it_stands(self):
        nowhere = {"rope_theta": None, "rope_parameters": None}
        attention = self.dbrx(clip_qkv=1.5)["attn_config"] | {"rope_theta": 5e5}
        for golden, where in (("moe_odd", {"rope_theta": 5e5}), ("moe_odd", {"rope_parameters": {"rope_theta": 5e5}}),
                              ("dbrx", {"attn_config": attention})):  # as it is published
            self.model(golden, **(nowhere | where))
            made = self.written()
            self.assertEqual(made.keys[f"{made.architecture}.rope.freq_base"], ("float32", 5e5))
        lacking = {key: value for key, value in self.model("moe_odd").items() if not key.startswith("rope_")}
        (self.folder / "config.json").write_text(json.dumps(lacking), encoding="utf-8")
        with self.assertRaisesRegex(BadInput, "lacks 'rope_theta'"):
            self.written()

    def test_a_gate_of_zeros_is_refused(self):  # as an upcycled model may begin
        with self.assertRaises(BadInput) as caught:
            gguf_families.gate_of("gate", np.zeros((1, 4), "<f4"))
        self.assertIn("gate is zero", str(caught.exception))
        np.testing.assert_array_equal(gguf_families.gate_of("gate", np.array([[0, 2]])), [0, 2])

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

    TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                     {"type": "Split", "pattern": {"Regex": QWEN2_CUT}, "behavior": "Isolated"},
                     {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
                 "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}, {"id": 4, "content": "own"}]}

    def test_a_vocabulary(self):
        self.model("moe_odd", eos_token_id=[3, 4])
        (self.folder / "tokenizer.json").write_text(json.dumps(self.TOKENIZER))
        keys = {key: value for key, (_, value) in self.written().keys.items()}
        self.assertEqual(keys["tokenizer.ggml.tokens"][:6], ["a", "b", "ab", "<|end|>", "own", "[PAD5]"])
        self.assertEqual(len(keys["tokenizer.ggml.tokens"]), 101)
        self.assertEqual(keys["tokenizer.ggml.token_type"][:6], [1, 1, 1, 3, 4, 5])
        self.assertEqual(keys["tokenizer.ggml.merges"], ["a b"])
        self.assertEqual((keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.bos_token_id"]), (3, 0))
        self.assertEqual(keys["tokenizer.ggml.pre"], "qwen2")

    # Left to itself llama.cpp puts a token before a text, or none, by the kind of the tokenizer.
    def test_what_stands_around_a_text(self):
        self.model("moe_odd", eos_token_id=[4])
        template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}},
                                                             {"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [3], "tokens": ["<|end|>"]}}}
        for step in (template, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}):
            (self.folder / "tokenizer.json").write_text(json.dumps(self.TOKENIZER | {"post_processor": step}))
            keys = {key: value for key, (_, value) in self.written().keys.items()}
            names = ("add_bos_token", "bos_token_id", "add_eos_token", "eos_token_id")
            self.assertEqual([keys[f"tokenizer.ggml.{name}"] for name in names], [True, 3, False, 4])
        self.assertNotIn("tokenizer.chat_template", keys)
        (self.folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
        self.assertEqual(self.written().keys["tokenizer.chat_template"], ("string", "{{ messages }}"))
        (self.folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": [
            {"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "{{ eos_token }}"}]}))
        self.assertEqual(self.written().keys["tokenizer.chat_template"], ("string", "{{ eos_token }}"))
        (self.folder / "chat_template.jinja").write_text("{{ bos_token }}")
        self.assertEqual(self.written().keys["tokenizer.chat_template"], ("string", "{{ bos_token }}"))

    def test_a_vocabulary_that_cuts_text_otherwise_is_refused(self):
        self.model("moe_odd")
        whole = json.dumps(self.TOKENIZER)
        for tokenizer in (whole.replace("N}|", "N}{1,3}|"), whole.replace("BPE", "Unigram"),
                          whole.replace('"type": "Split"', '"type": "Digits"'),
                          whole.replace('"vocab"', '"ignore_merges": true, "vocab"'),
                          whole.replace(', "use_regex": false', ""), whole.replace("Isolated", "Removed"),
                          whole.replace('prefix_space": false', 'prefix_space": true'),
                          whole.replace('[{"type": "Split"', '[{"type": "Digits"}, {"type": "Split"')):
            self.assertNotEqual(tokenizer, whole)
            (self.folder / "tokenizer.json").write_text(tokenizer)
            with self.assertRaises(BadInput):
                self.written()
        both = whole.replace("N}|", "N}{1,3}|").replace('"vocab"', '"ignore_merges": true, "vocab"')
        (self.folder / "tokenizer.json").write_text(both)
        self.assertEqual(self.written().keys["tokenizer.ggml.pre"], ("string", "llama-bpe"))

    def test_what_llama_cpp_would_compute_otherwise_is_refused(self):
        for golden, changes, words in (("moe_odd", {"norm_topk_prob": True}, "norm_topk_prob"),
                                       ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
                                       ("moe_odd", {"mlp_only_layers": [0]}, "layers without experts"),
                                       ("moe_odd", {"shared_expert_intermediate_size": 0}, "no shared expert"),
                                       ("moe_odd", {"use_sliding_window": True}, "use_sliding_window"),
                                       ("mixtral", {"sliding_window": 8}, "sliding_window"),
                                       ("moe_odd", {"rope_scaling": {"type": "yarn"}}, "yarn"),
                                       ("llama", {"hidden_act": "gelu"}, "gelu"),
                                       ("moe_odd", {"head_dim": 8}, "heads of 8"),
                                       ("deepseek", {"norm_topk_prob": True}, "norm_topk_prob"),
                                       ("deepseek", {"n_shared_experts": None}, "no shared expert"),
                                       ("deepseek", {"moe_layer_freq": 2}, "layers without experts"),
                                       ("dots1", {}, "2 key and value heads for 4"),
                                       ("gemma", {"tie_word_embeddings": False}, "tensor of their own"),
                                       ("gemma", {"hidden_activation": "gelu"}, "hidden_act 'gelu'"),
                                       ("dbrx", self.dbrx(clip_qkv=None), "clip_qkv"),
                                       ("dbrx", self.dbrx(moe_normalize_expert_weights=2), "moe_normalize"),
                                       ("dbrx", self.dbrx(moe_normalize_expert_weights=None, ffn_act_fn=None),
                                        "moe_normalize"),
                                       ("dbrx", self.dbrx(ffn_act_fn={"name": "gelu"}), "hidden_act 'gelu'"),
                                       ("llama", {"model_type": "phi"}, "model_type 'phi'")):
            self.model(golden, **changes)
            with self.assertRaises(BadInput) as caught:
                self.written()
            self.assertIn(words, str(caught.exception))


class FamiliesTest(GgufFolder):
    """Beside qwen2's: what of a layer is where."""

    def test_every_family_of_a_saved_model_is_whole(self):
        for golden, architecture in (("llama", "llama"), ("mistral", "llama"), ("mixtral", "llama"),
                                     ("qwen3", "qwen3"), ("deepseek", "deepseek"), ("dense_tied_gqa", "qwen2"),
                                     ("moe_odd", "qwen2moe"), ("gemma", "gemma"), ("dbrx", "dbrx")):
            self.model(golden, **({"sliding_window": None} if golden == "mistral" else {}))
            self.assertEqual(self.written().architecture, architecture, golden)

    def test_rotary_positions_of_neighbours(self):
        self.model("mixtral")  # 4 heads and 2 of keys, of 12 values
        made, stored = self.written(), write_gguf.Tensors(self.folder)
        for part, heads in (("q", 4), ("k", 2)):
            ours = stored.read(f"model.layers.1.self_attn.{part}_proj.weight")
            theirs = made.tensors[f"blk.1.attn_{part}.weight"]
            for head in range(heads):
                for pair in range(6):
                    for half in range(2):
                        np.testing.assert_array_equal(theirs[12 * head + 2 * pair + half],
                                                      ours[12 * head + 6 * half + pair])
        np.testing.assert_array_equal(made.tensors["blk.1.attn_v.weight"],
                                      stored.read("model.layers.1.self_attn.v_proj.weight"))
        self.model("qwen3")
        np.testing.assert_array_equal(self.written().tensors["blk.1.attn_q.weight"],
                                      write_gguf.Tensors(self.folder).read("model.layers.1.self_attn.q_proj.weight"))

    def test_mixtral(self):
        config = self.model("mixtral")
        made, stored = self.written(), write_gguf.Tensors(self.folder)
        for name, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            for expert in (0, 7):
                np.testing.assert_array_equal(
                    made.tensors[f"blk.0.ffn_{name}_exps.weight"][expert],
                    stored.read(f"model.layers.0.block_sparse_moe.experts.{expert}.{ours}.weight"))
        np.testing.assert_array_equal(made.tensors["blk.0.ffn_gate_inp.weight"],
                                      stored.read("model.layers.0.block_sparse_moe.gate.weight"))
        self.assertEqual([made.keys[f"llama.{key}"] for key in (
            "feed_forward_length", "expert_count", "expert_used_count", "rope.dimension_count")],
            [("uint32", config["intermediate_size"]), ("uint32", 8), ("uint32", 2), ("uint32", 12)])

    def test_gemma_has_norms_beside_one(self):
        self.model("gemma")
        made, stored = self.written(), write_gguf.Tensors(self.folder)
        for name, ours in (("output_norm", "model.norm"), ("blk.1.attn_norm", "model.layers.1.input_layernorm"),
                           ("blk.1.ffn_norm", "model.layers.1.post_attention_layernorm")):
            np.testing.assert_array_equal(made.tensors[f"{name}.weight"], stored.read(f"{ours}.weight") + 1)
        np.testing.assert_array_equal(made.tensors["blk.0.attn_k.weight"],
                                      stored.read("model.layers.0.self_attn.k_proj.weight"))
        self.assertNotIn("output.weight", made.tensors)

    def test_dbrx_has_all_experts_in_a_tensor(self):
        config = self.model("dbrx")
        made, stored = self.written(), write_gguf.Tensors(self.folder)
        width, place = config["ffn_config"]["ffn_hidden_size"], "transformer.blocks.1.ffn.experts.mlp"
        for expert in (0, 7):
            rows = slice(expert * width, (expert + 1) * width)
            for name, ours in (("gate", "w1"), ("up", "v1")):
                np.testing.assert_array_equal(made.tensors[f"blk.1.ffn_{name}_exps.weight"][expert],
                                              stored.read(f"{place}.{ours}")[rows])
            np.testing.assert_array_equal(made.tensors["blk.1.ffn_down_exps.weight"][expert],
                                          stored.read(f"{place}.w2")[rows].T)
        self.assertEqual([made.keys[f"dbrx.{key}"] for key in (
            "block_count", "embedding_length", "feed_forward_length", "attention.head_count_kv", "expert_count",
            "expert_used_count", "attention.clamp_kqv", "attention.layer_norm_epsilon")],
            [("uint32", 2), ("uint32", 48), ("uint32", 20), ("uint32", 2), ("uint32", 8), ("uint32", 3),
             ("float32", 1.5), ("float32", 1e-5)])
        self.assertNotIn("dbrx.attention.layer_norm_rms_epsilon", made.keys)

    def test_deepseek_has_dense_layers_first(self):
        self.model("deepseek")
        made = self.written()
        for name, there in (("blk.0.ffn_up.weight", True), ("blk.0.ffn_up_exps.weight", False),
                            ("blk.1.ffn_up.weight", False), ("blk.1.ffn_up_exps.weight", True),
                            ("blk.1.ffn_up_shexp.weight", True), ("blk.1.ffn_gate_inp_shexp.weight", False)):
            self.assertEqual(name in made.tensors, there, name)
        self.assertEqual([made.keys[f"deepseek.{key}"] for key in (
            "leading_dense_block_count", "expert_shared_count", "expert_feed_forward_length", "expert_weights_scale")],
            [("uint32", 1), ("uint32", 2), ("uint32", 20), ("float32", 1.0)])

    def test_dots1_has_a_bias_that_chooses(self):
        self.model("dots1", num_key_value_heads=4)
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        family = gguf_families.family_of(config, "config.json")
        self.assertEqual(family.layer_names(config, 1)["mlp.gate.e_score_correction_bias"], "exp_probs_b.bias")
        self.assertNotIn("mlp.gate.e_score_correction_bias", family.layer_names(config, 0))
        keys = {key: value for key, _, value in family.keys(config)}
        self.assertEqual([keys[key] for key in ("expert_gating_func", "expert_weights_norm", "expert_weights_scale",
                                                "expert_group_count", "expert_group_used_count")], [2, True, 2.5, 3, 2])


if __name__ == "__main__":
    unittest.main()
