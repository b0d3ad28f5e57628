"""The mixtures of other families than Qwen2's among the golden files of make_golden.py."""

import sys
from pathlib import Path

import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
import deepseek_moe  # noqa: E402

CLASSES = {"mixtral": "Mixtral", "deepseek": "Deepseek", "qwen3_moe": "Qwen3Moe"}
ROUTERS = (modeling_mixtral.MixtralTopKRouter, DeepseekV2TopkRouter, modeling_qwen3_moe.Qwen3MoeTopKRouter)

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
}


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


def in_float64(norm, rotary):
    """What make_golden.in_float64 replaces beside Qwen2's own: (class, method, the same formula without fp32)."""
    swaps = [(modeling_mixtral.MixtralTopKRouter, "forward", mixtral_router),
             (modeling_qwen3_moe.Qwen3MoeTopKRouter, "forward", qwen3_router),
             (deepseek_moe.DeepseekRouter, "forward", deepseek_router)]
    for module, prefix in ((modeling_mixtral, "Mixtral"), (modeling_llama, "Llama"), (modeling_qwen3_moe, "Qwen3Moe")):
        swaps += [(getattr(module, prefix + "RMSNorm"), "forward", norm),
                  (getattr(module, prefix + "RotaryEmbedding"), "forward", rotary)]
    return swaps
