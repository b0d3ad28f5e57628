#!/usr/bin/env python3
"""Recipes that look at tokens, against what was published of them, computed naively and in double: routers as
mergekit-moe makes them of prompts, experts as CMoE (arXiv 2502.04416) makes them of active neurons. And how far from
the dense model those recipes and grow-2x begin, as docs/recipes.md says. Needs UPMOE_BINARY.
"""

import json
import re
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np
from cli_test import ROOT, read_safetensors, safetensors_bytes, upmoe
from scipy.optimize import linear_sum_assignment

HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD, VOCAB = 64, 688, 2, 4, 2, 16, 64  # 688: what the tiny recipes are for
SEQUENCES, LENGTH = 64, 32  # that are looked at
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": HIDDEN,
          "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
          "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
          "rope_theta": 1e4, "tie_word_embeddings": False, "use_sliding_window": False, "torch_dtype": "float32"}


def random_weights():
    """By name; norms and biases too, so that none can be forgotten unseen."""
    random, shapes = np.random.default_rng(4), {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        for name, rows in (("q", HEADS * HEAD), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD)):
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
        for name in ("input", "post_attention"):
            shapes[f"model.layers.{layer}.{name}_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: (random.normal(0.0, 0.1, shape) + name.endswith("norm.weight")).astype("<f4")
            for name, shape in shapes.items()}


def normed(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"]) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rotated(x_SHd):
    half = HEAD // 2
    angles = np.arange(len(x_SHd))[:, None, None] / CONFIG["rope_theta"] ** (np.arange(half) / half)
    a, b = x_SHd[..., :half], x_SHd[..., half:]
    return np.concatenate((a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)), -1)


def attention(x_SD, weights, name):
    q, k, v = ((x_SD @ weights[f"{name}.{part}_proj.weight"].T + weights[f"{name}.{part}_proj.bias"])
               .reshape(len(x_SD), -1, HEAD) for part in "qkv")
    k, v = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (rotated(k), v))
    scores_HSS = np.einsum("qhd,khd->hqk", rotated(q), k) / np.sqrt(HEAD)
    scores_HSS[:, ~np.tri(len(x_SD), dtype=bool)] = -np.inf
    chances_HSS = np.exp(scores_HSS - scores_HSS.max(-1, keepdims=True))
    chances_HSS /= chances_HSS.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", chances_HSS, v).reshape(len(x_SD), -1) @ weights[f"{name}.o_proj.weight"].T


def states_of(tokens_S, weights):
    """Of every layer what comes to its block, which is what mergekit-moe reads, and what its FFN reads."""
    x_SD = weights["model.embed_tokens.weight"][tokens_S]
    for layer in range(LAYERS):
        name, before_SD = f"model.layers.{layer}", x_SD
        x_SD = x_SD + attention(normed(x_SD, weights[f"{name}.input_layernorm.weight"]), weights, f"{name}.self_attn")
        read_SD = normed(x_SD, weights[f"{name}.post_attention_layernorm.weight"])
        yield before_SD, read_SD
        gate, up, down = (weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x_SD = x_SD + silu(read_SD @ gate.T) * (read_SD @ up.T) @ down.T


class Published(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name)
        weights = random_weights()
        (cls.folder / "dense").mkdir()
        (cls.folder / "dense/config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        (cls.folder / "dense/model.safetensors").write_bytes(safetensors_bytes(
            {name: ("F32", list(values.shape), values.tobytes()) for name, values in weights.items()}))
        cls.weights = {name: values.astype(np.float64) for name, values in weights.items()}
        random, cls.texts = np.random.default_rng(7), {}
        for name, low, high in (("low", 0, VOCAB // 2), ("high", VOCAB // 2, VOCAB)):
            cls.texts[name] = random.integers(low, high, 2 * SEQUENCES * LENGTH, dtype=np.uint32)
            with h5py.File(cls.folder / f"{name}.h5", "w") as file:
                file["tokens"], file["document_ends"] = cls.texts[name], np.array([len(cls.texts[name])])
                file.attrs.update({"vocab_size": VOCAB, "eos_id": 0, "tokenizer_sha256": "0" * 64,
                                   "format": "upmoe-tokens-1"})

    def states(self, text):
        """[(what comes to the block, what the FFN reads) [sequences, length, hidden]] of the layers."""
        sequences = self.texts[text][:SEQUENCES * LENGTH].reshape(SEQUENCES, LENGTH)
        layers = zip(*(states_of(tokens_S, self.weights) for tokens_S in sequences))
        return [tuple(np.stack(states) for states in zip(*layer)) for layer in layers]

    def upcycle(self, recipe, *words, dense="dense"):
        """The mixture's tensors by name."""
        to = self.folder / f"{self.id()}.{recipe}"
        done = upmoe("upcycle", ROOT / f"configs/upcycle/{recipe}-tiny.yaml", "--from", self.folder / dense, "--to", to,
                     *words)
        self.assertEqual(done.returncode, 0, done.stderr)
        return to, {name: np.frombuffer(data, "<f4").reshape(shape).astype(np.float64) for name, (_, shape, data) in
                    read_safetensors(to / "model.safetensors")[0].items()}

    def calibrated(self):
        return self.upcycle("cmoe", "--calibrate", self.folder / "low.h5", "--calibrate-seq-len", LENGTH,
                            "--calibrate-sequences", SEQUENCES)

    def prompted(self, *words):
        files = (word for text in self.texts for word in ("--prompts", self.folder / f"{text}.h5"))
        return self.upcycle("btx-prompts", *files, "--prompt-seq-len", LENGTH, "--prompt-sequences", SEQUENCES, *words)


class MergekitMoe(Published):
    # Its gate_mode hidden_avg: of every layer the mean over a prompt's tokens, of these the mean over the prompts, to
    # length 1. Of what the FFN reads, which is not where mergekit reads.
    def test_rows_of_the_router(self):
        _, made = self.prompted("router.std=0")
        states = {text: self.states(text) for text in self.texts}

        def rows_of(layer, of_text):  # four experts for each text
            return unit(np.stack([of_text(*states[text][layer]) for text in self.texts for _ in range(4)]))

        for layer in range(LAYERS):
            rows_ED = made[f"model.layers.{layer}.mlp.gate.weight"]
            expected_ED = rows_of(layer, lambda before_BSD, read_BSD: read_BSD.mean(1).mean(0))
            # Rounding of fp32 turns a row by some 1e-6: 1e-12 of the cosine.
            self.assertGreater((unit(rows_ED) * expected_ED).sum(-1).min(), 1 - 1e-9)
            np.testing.assert_allclose(np.linalg.norm(rows_ED, axis=-1), 1, atol=1e-6)
            # What else could be read, and rows of the other text, would be seen.
            for other_ED in (rows_of(layer, lambda before_BSD, read_BSD: before_BSD.mean(1).mean(0)),
                             rows_of(layer, lambda before_BSD, read_BSD: read_BSD[:, -1].mean(0)), expected_ED[::-1]):
                self.assertLess((unit(rows_ED) * other_ED).sum(-1).max(), 0.9999)


def moved_for_nothing(cost_RG, group_R):
    """Of an assignment with the least sum the rows that another one with this sum has elsewhere."""
    groups = range(cost_RG.shape[1])
    move_RG = cost_RG - cost_RG[np.arange(len(cost_RG)), group_R][:, None]
    way_GG = np.stack([move_RG[group_R == g].min(0) for g in groups])  # the cheapest row out of g into each other
    for via in groups:
        way_GG = np.minimum(way_GG, way_GG[:, via, None] + way_GG[None, via])
    return np.array([any(g != own and move[g] + way_GG[g, own] == 0 for g in groups)
                     for move, own in zip(move_RG, group_R)])


class CMoE(Published):
    EXPERTS, CHOSEN, SHARED, MARKERS = 5, 3, 258, 10  # of cmoe-tiny

    def markers(self, layer):
        """[tokens, neurons]: 1 at the neurons of the largest activity, of vectors of length 1 each."""
        x_TD = unit(self.states("low")[layer][1].reshape(-1, HIDDEN))
        gate, up = (unit(self.weights[f"model.layers.{layer}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        size_TF = np.abs(silu(x_TD @ gate.T) * (x_TD @ up.T))
        order_TF = np.argsort(-size_TF, axis=-1)
        sorted_TF = np.take_along_axis(size_TF, order_TF, -1)
        gaps = 1 - sorted_TF[:, self.MARKERS] / sorted_TF[:, self.MARKERS - 1]
        self.assertGreater(gaps.min(), 1e-5, "a token for which fp32 may mark another neuron: choose another seed")
        markers_TF = np.zeros(size_TF.shape, dtype=np.int64)
        np.put_along_axis(markers_TF, order_TF[:, :self.MARKERS], 1, -1)
        return markers_TF

    def parts(self, made, layer):
        """The neurons of the shared expert and of each routed one, by their rows of the dense model."""
        name = f"model.layers.{layer}.mlp"
        dense = {part: self.weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")}
        neuron_of = {row.tobytes(): neuron for neuron, row in enumerate(dense["gate"])}
        # A gate of 1/2 on the shared expert; three experts of weights that add up to 1, for three of weight 1.
        for expert, factor in (("shared_expert", 2), *((f"experts.{e}", self.CHOSEN) for e in range(self.EXPERTS))):
            neurons = [neuron_of[row.tobytes()] for row in made[f"{name}.{expert}.gate_proj.weight"]]
            np.testing.assert_array_equal(made[f"{name}.{expert}.up_proj.weight"], dense["up"][neurons])
            np.testing.assert_allclose(made[f"{name}.{expert}.down_proj.weight"], factor * dense["down"][:, neurons],
                                       rtol=1e-7)
            yield np.array(neurons)

    def test_experts_and_their_routers(self):
        _, made = self.calibrated()
        for layer in range(LAYERS):
            markers_TF = self.markers(layer)
            count_F = markers_TF.sum(0)
            shared, *experts = self.parts(made, layer)
            most = np.argsort(-count_F, kind="stable")
            self.assertEqual(sorted(shared), sorted(most[:self.SHARED]))
            rest = np.sort(most[self.SHARED:])
            # A seed is the column of markers of a neuron; the distance is the sum of what differs.
            seeds = rest[np.argsort(-count_F[rest], kind="stable")[:self.EXPERTS]]
            cost_RG = np.abs(markers_TF[:, rest, None] - markers_TF[:, None, seeds]).sum(0)
            each = len(rest) // self.EXPERTS
            best_R = linear_sum_assignment(np.repeat(cost_RG, each, axis=1))[1] // each
            self.assertEqual([len(expert) for expert in experts], [each] * self.EXPERTS)
            group_of = {neuron: g for g, expert in enumerate(experts) for neuron in expert}
            found_R = np.array([group_of[neuron] for neuron in rest])
            rows = np.arange(len(rest))
            self.assertEqual(cost_RG[rows, found_R].sum(), cost_RG[rows, best_R].sum())
            certain_R = ~moved_for_nothing(cost_RG, best_R)
            np.testing.assert_array_equal(found_R[certain_R], best_R[certain_R])
            self.assertGreater(certain_R.sum(), 50, "the least sum says of hardly any neuron where it belongs")
            self.assertLess((cost_RG[rows, best_R] == cost_RG.min(1)).mean(), 0.9, "equal numbers hold nobody back")
            self.check_representatives(made, layer, markers_TF, experts)

    def check_representatives(self, made, layer, markers_TF, experts):
        rows_ED = made[f"model.layers.{layer}.mlp.gate.weight"]
        gate = unit(self.weights[f"model.layers.{layer}.mlp.gate_proj.weight"])
        for row, expert in zip(rows_ED, experts, strict=True):
            members_TM = markers_TF[:, expert]
            far_M = np.abs(len(expert) * members_TM - members_TM.sum(1, keepdims=True)).sum(0)  # times their number
            nearest = min(expert[far_M == far_M.min()])
            self.assertGreater(unit(row) @ gate[nearest], 1 - 1e-12)
            np.testing.assert_allclose(row, gate[nearest], atol=1e-7)


class Starts(Published):
    def test_recipes_begin_where_the_document_says(self):
        document = (ROOT / "docs/recipes.md").read_text("utf-8")
        told = dict(re.findall(r"^\| `([\w.-]+)` \|(?:[^|]*\|){3} ([^|]+) \|", document, re.MULTILINE))
        smaller, _ = self.upcycle("qwen1.5-moe-a2.7b")
        for recipe, made in (("cmoe", self.calibrated()), ("btx-prompts", self.prompted()),
                             ("grow-2x", self.upcycle("grow-2x", dense=smaller))):
            layers = json.loads((made[0] / "upcycle_report.json").read_text("utf-8"))["layers"]
            error = max(layer["relative_error"] for layer in layers)
            if told[recipe] == "below 1e-5":
                self.assertLess(error, 1e-5, recipe)
            else:
                self.assertEqual(told[recipe], f"{error:.2f}", recipe)


if __name__ == "__main__":
    unittest.main(verbosity=2)
