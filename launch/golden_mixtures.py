"""The mixtures of other families than Qwen2's among the golden files of make_golden.py."""

import sys
from pathlib import Path

import torch
from transformers.models.dbrx import modeling_dbrx
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.dots1 import modeling_dots1
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
import deepseek_moe  # noqa: E402

CLASSES = {"mixtral": "Mixtral", "deepseek": "Deepseek", "qwen3_moe": "Qwen3Moe", "dots1": "Dots1",
           "dbrx": "Dbrx"}
ROUTERS = (modeling_mixtral.MixtralTopKRouter, DeepseekV2TopkRouter, modeling_qwen3_moe.Qwen3MoeTopKRouter,
           modeling_dots1.Dots1TopkRouter, modeling_dbrx.DbrxRouter)

COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "initializer_range": 0.05,
          "attention_dropout": 0.0}
CASES = {
    # Grouped heads whose width is not hidden_size / heads
    "mixtral": (COMMON | dict(model_type="mixtral", hidden_size=40, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, head_dim=12, intermediate_size=36, vocab_size=96,
                              tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2,
                              router_aux_loss_coef=0.02, output_router_logits=False), 18, 1e4),
    # Layer 0 is dense, the others are mixtures with two shared experts; the router's weights are not renormalised
    "deepseek": (COMMON | dict(model_type="deepseek", hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                               num_key_value_heads=4, intermediate_size=72, vocab_size=100,
                               tie_word_embeddings=False, n_routed_experts=12, n_shared_experts=2,
                               num_experts_per_tok=3, moe_intermediate_size=20, first_k_dense_replace=1,
                               moe_layer_freq=1, norm_topk_prob=False, scoring_func="softmax", aux_loss_alpha=0.02,
                               seq_aux=True), 16, 2e4),
    # Norms of q and k; layers 1 and 3 are mixtures
    "qwen3_moe": (COMMON | dict(model_type="qwen3_moe", hidden_size=40, num_hidden_layers=4, num_attention_heads=4,
                                num_key_value_heads=2, head_dim=12, intermediate_size=72, vocab_size=96,
                                tie_word_embeddings=False, num_experts=12, num_experts_per_tok=3,
                                moe_intermediate_size=20, norm_topk_prob=True, decoder_sparse_step=1,
                                mlp_only_layers=[0, 2], router_aux_loss_coef=0.02, output_router_logits=False,
                                attention_bias=False, use_sliding_window=False), 18, 1e4),
    # Layer 0 is dense; routers of sigmoids choose out of two of three groups by a bias, renormalised and times 2.5
    "dots1": (COMMON | dict(model_type="dots1", hidden_size=40, num_hidden_layers=3, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=12, intermediate_size=72, vocab_size=96,
                            tie_word_embeddings=False, n_routed_experts=12, n_shared_experts=2, num_experts_per_tok=3,
                            moe_intermediate_size=20, first_k_dense_replace=1, norm_topk_prob=True, n_group=3,
                            topk_group=2, routed_scaling_factor=2.5, attention_bias=False, sliding_window=None,
                            output_router_logits=False), 18, 1e4),
    # LayerNorms, and a limit on q, k and v that one in five exceeds
    "dbrx": (dict(model_type="dbrx", d_model=48, n_layers=2, n_heads=4, max_seq_len=64, vocab_size=96,
                  initializer_range=0.05, tie_word_embeddings=False, resid_pdrop=0.0, emb_pdrop=0.0,
                  attn_config=dict(clip_qkv=1.5, kv_n_heads=2, rope_theta=1e4, attn_pdrop=0.0),
                  ffn_config=dict(ffn_hidden_size=20, moe_num_experts=8, moe_top_k=3, moe_loss_weight=0.02,
                                  moe_normalize_expert_weights=1.0), output_router_logits=False), 18, 1e4),
}


def top_k(config):
    return config.ffn_config.moe_top_k if config.model_type == "dbrx" else config.num_experts_per_tok


def weight_of(gate):
    return gate.layer.weight if isinstance(gate, modeling_dbrx.DbrxRouter) else gate.weight


def scores(self, x):
    logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    value, index = torch.topk(torch.softmax(logits, dim=-1), self.top_k, dim=-1)
    return logits, value, index


def mixtral_router(self, x):
    logits, value, index = scores(self, x)
    return logits, value / value.sum(dim=-1, keepdim=True), index


def qwen3_router(self, x):
    logits, value, index = scores(self, x)
    return logits, value / value.sum(dim=-1, keepdim=True) if self.norm_topk_prob else value, index


def deepseek_router(self, x):
    logits, value, index = scores(self, x)
    return logits, deepseek_moe.renormalised(value) if self.renormalise else value, index


def dots1_choice(self, logits):
    """What experts are chosen by: the scores with their biases, -inf outside the chosen groups; and the scores."""
    scores = logits.sigmoid()
    grouped = (scores + self.e_score_correction_bias).view(-1, self.num_group, self.num_experts // self.num_group)
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.topk_group, dim=-1).indices
    open_groups = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1.0).bool()
    return grouped.masked_fill(~open_groups[..., None], float("-inf")).view_as(scores), scores


def dots1_router(self, x):
    logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    choice, score = dots1_choice(self, logits)
    index = choice.topk(self.top_k, dim=-1).indices
    value = score.gather(1, index)
    if self.norm_topk_prob:
        value = value / (value.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, value * self.routed_scaling_factor, index


def group_margin(self, logits):
    """Between the last group that is open and the first that is not."""
    grouped = (logits.sigmoid() + self.e_score_correction_bias).view(-1, self.num_group,
                                                                     self.num_experts // self.num_group)
    score = grouped.topk(2, dim=-1).values.sum(dim=-1).sort(dim=-1, descending=True).values
    if self.topk_group == self.num_group:
        return float("inf")
    return (score[:, self.topk_group - 1] - score[:, self.topk_group]).min().item()


def routing(self, logits):
    """Of a router: the probabilities of the balance term, what it chooses by, and how near its groups are to a tie."""
    if isinstance(self, modeling_dots1.Dots1TopkRouter):
        choice, score = dots1_choice(self, logits)
        return score / (score.sum(dim=-1, keepdim=True) + 1e-20), choice, group_margin(self, logits)
    probs = torch.softmax(logits, dim=-1)
    return probs, probs, float("inf")


def in_float64(norm, rotary):
    """What make_golden.in_float64 replaces beside Qwen2's own: (class, method, the same formula without fp32)."""
    swaps = [(modeling_mixtral.MixtralTopKRouter, "forward", mixtral_router),
             (modeling_qwen3_moe.Qwen3MoeTopKRouter, "forward", qwen3_router),
             (deepseek_moe.DeepseekRouter, "forward", deepseek_router),
             (modeling_dots1.Dots1TopkRouter, "forward", dots1_router),
             (modeling_dbrx.DbrxRotaryEmbedding, "forward", rotary)]
    for module, prefix in ((modeling_mixtral, "Mixtral"), (modeling_llama, "Llama"), (modeling_qwen3_moe, "Qwen3Moe"),
                           (modeling_dots1, "Dots1")):
        swaps += [(getattr(module, prefix + "RMSNorm"), "forward", norm),
                  (getattr(module, prefix + "RotaryEmbedding"), "forward", rotary)]
    return swaps
