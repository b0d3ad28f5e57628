"""DeepSeekMoE-16B as transformers' own modules: Llama's layers, of which those behind the first are mixtures.

transformers has no class for the model_type `deepseek`; the published directory brings its code. Importing this file
registers one built of classes that are there: attention, norms and dense layers of Llama, `DeepseekV2Moe` in the others
(softmax over all experts, the greedy top k, shared experts without a gate) with the weights renormalised where the
configuration says so.
"""

import transformers
from torch import nn
from transformers import conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe, DeepseekV2TopkRouter


class DeepseekConfig(transformers.LlamaConfig):
    model_type = "deepseek"

    def __init__(self, n_routed_experts=None, n_shared_experts=None, num_experts_per_tok=None,
                 moe_intermediate_size=1408, norm_topk_prob=False, first_k_dense_replace=0, moe_layer_freq=1,
                 scoring_func="softmax", aux_loss_alpha=0.001, seq_aux=True, **kwargs):
        assert scoring_func == "softmax" and moe_layer_freq == 1
        self.n_routed_experts, self.n_shared_experts = n_routed_experts, n_shared_experts
        self.num_experts_per_tok, self.moe_intermediate_size = num_experts_per_tok, moe_intermediate_size
        self.norm_topk_prob, self.first_k_dense_replace = norm_topk_prob, first_k_dense_replace
        self.moe_layer_freq, self.scoring_func = moe_layer_freq, scoring_func
        self.aux_loss_alpha, self.seq_aux = aux_loss_alpha, seq_aux
        # What DeepseekV2Moe asks for beside
        self.num_experts, self.topk_method, self.routed_scaling_factor = n_routed_experts, "greedy", 1.0
        self.n_group = self.topk_group = 1
        super().__init__(**kwargs)


class DeepseekRouter(DeepseekV2TopkRouter):
    def forward(self, hidden_states):
        logits, weight, index = super().forward(hidden_states)
        return logits, renormalised(weight) if self.renormalise else weight, index


def renormalised(weight):
    return weight / weight.sum(dim=-1, keepdim=True)


class NoSharedExperts(nn.Module):
    def forward(self, x):
        return x.new_zeros(x.shape)


class DeepseekMoe(DeepseekV2Moe):
    def __init__(self, config):
        count = config.n_shared_experts
        config.n_shared_experts = count or 1
        super().__init__(config)
        config.n_shared_experts = count
        if not count:
            self.shared_experts = NoSharedExperts()
        self.gate = DeepseekRouter(config)
        self.gate.renormalise = config.norm_topk_prob and config.num_experts_per_tok > 1


class DeepseekForCausalLM(transformers.LlamaForCausalLM):
    config_class = DeepseekConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers[config.first_k_dense_replace:]:
            layer.mlp = DeepseekMoe(config)
        self.post_init()


transformers.AutoConfig.register("deepseek", DeepseekConfig)
transformers.AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
conversion_mapping.register_checkpoint_conversion_mapping(
    "deepseek", conversion_mapping.get_checkpoint_conversion_mapping("qwen2_moe"))
