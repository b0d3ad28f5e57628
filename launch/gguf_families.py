"""How each family of models lies in a GGUF file, and what of it llama.cpp would compute otherwise. Of llama.cpp as
llama-cpp-python 0.3.36 has it: an architecture there fixes what a config.json here may choose."""

from command_line import BadInput

SIGMOID = 2  # of llama.cpp's functions that score experts

# our layers' tensors: llama.cpp's name
_MATRICES = ("gate", "up", "down")
_BIASES = {f"self_attn.{part}_proj.bias": f"attn_{part}.bias" for part in "qkv"}
_ATTENTION = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
              "self_attn.o_proj.weight": "attn_output.weight",
              **{f"self_attn.{part}_proj.weight": f"attn_{part}.weight" for part in "qkv"}}
_HEAD_NORMS = {f"self_attn.{part}_norm.weight": f"attn_{part}_norm.weight" for part in "qk"}
_DENSE = {f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in _MATRICES}
_ROUTER = {"mlp.gate.weight": "ffn_gate_inp.weight"}
_EXPERTS = {f"mlp.experts.{{}}.{part}_proj.weight": f"ffn_{part}_exps.weight" for part in _MATRICES}
_MIXTRAL_EXPERTS = {f"block_sparse_moe.experts.{{}}.{name}.weight": f"ffn_{part}_exps.weight"
                    for name, part in zip(("w1", "w3", "w2"), _MATRICES)}


def _shared(module):
    return {f"mlp.{module}.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in _MATRICES}


def heads_of(config):
    """(heads, key and value heads, values of one)."""
    heads = config["num_attention_heads"]
    return (heads, config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads)


class Family:
    """A model_type: its architecture there, the names of tensors, what is refused.

    `window` is the key of config.json by which attention sees a part of what came before; `paired`, whether rotary
    positions turn neighbours there (a query's and a key's rows lie in another order then, see paired_rows).
    """

    embedding, norm, layers = "model.embed_tokens.weight", "model.norm.weight", "model.layers.{}."
    activation = "silu"

    def __init__(self, architecture, attention, window=None, paired=False):
        self.architecture, self.attention = architecture, attention
        self.window, self.paired = window, paired
        self.optional = frozenset(_BIASES)

    def layer_names(self, config, layer):
        del config, layer
        return {**self.attention, **_DENSE}

    def expert_names(self, config, layer):
        """Of tensors that are one for each expert here, and one for all of them there."""
        del config, layer
        return {}

    def values(self, config, name, values):
        """Those of a tensor as they are there; `name` is ours, of one layer's without its number."""
        heads, key_heads, _ = heads_of(config)
        rows = {"self_attn.q_proj": heads, "self_attn.k_proj": key_heads}.get(name.rpartition(".")[0])
        return paired_rows(values, rows) if self.paired and rows else values

    def head(self, config):
        """Our name of what makes logits, if it is a tensor of its own there."""
        return self.embedding if config.get("tie_word_embeddings") else "lm_head.weight"

    def norm_keys(self, config):
        yield "attention.layer_norm_rms_epsilon", "float32", config["rms_norm_eps"]

    def expert_count(self, config):
        del config
        return 0

    def keys(self, config):
        """(key without the architecture, kind of value, value) beside what every architecture has."""
        del config
        return ()

    def refusals(self, config):
        if self.window and config.get(self.window):
            yield f"{self.window}: the window would be left out"
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            yield f"rotary positions of type '{kind}'"
        if config.get("hidden_act", "silu") != self.activation:
            yield f"hidden_act '{config.get('hidden_act', 'silu')}'"


class _WholeHeads(Family):
    """Heads that are the hidden size together: its queries have no size of their own there."""

    def refusals(self, config):
        yield from super().refusals(config)
        heads, _, head_dim = heads_of(config)
        if heads * head_dim != config["hidden_size"]:
            yield f"{heads} heads of {head_dim}, which are not the hidden size of {config['hidden_size']} together"


class _Gemma(Family):
    """Norms multiply by one more than their weights; the embedding makes the logits."""

    activation = "gelu_pytorch_tanh"

    def values(self, config, name, values):
        return values + 1 if name.endswith("norm.weight") else super().values(config, name, values)

    def head(self, config):
        return None

    def refusals(self, config):
        yield from super().refusals({**config, "hidden_act": config.get("hidden_activation") or config["hidden_act"]})
        if not config.get("tie_word_embeddings", True):
            yield "logits by a tensor of their own"


class _Mixture(Family):
    """Experts in every layer. `renormalised`: whether the chosen experts' weights are made to add up to one there."""

    router, experts, shared, renormalised, count = _ROUTER, _EXPERTS, {}, True, "num_experts"

    def layer_names(self, config, layer):
        return {**self.attention, **self.router, **self.shared}

    def expert_names(self, config, layer):
        return self.experts

    def expert_count(self, config):
        return config[self.count]

    def counts(self, config):
        yield "expert_count", "uint32", self.expert_count(config)
        yield "expert_used_count", "uint32", config["num_experts_per_tok"]

    def keys(self, config):
        yield from self.counts(config)
        yield "expert_feed_forward_length", "uint32", config["moe_intermediate_size"]

    def refusals(self, config):
        yield from super().refusals(config)
        if self.renormalised is not None and bool(config.get("norm_topk_prob")) != self.renormalised:
            does = "divides them by their sum" if self.renormalised else "leaves them as softmax gives them"
            yield f"norm_topk_prob: the chosen experts' weights; llama.cpp {does}"
        if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
            yield "layers without experts among those that have them"


class _Mixtral(_Mixture):
    router, experts, renormalised = {"block_sparse_moe.gate.weight": "ffn_gate_inp.weight"}, _MIXTRAL_EXPERTS, None
    count = "num_local_experts"

    def keys(self, config):
        yield from self.counts(config)


class _Qwen2Moe(_Mixture, _WholeHeads):
    shared, renormalised = {"mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
                            **_shared("shared_expert")}, False

    def keys(self, config):
        yield from super().keys(config)
        yield "expert_shared_feed_forward_length", "uint32", config["shared_expert_intermediate_size"]

    def values(self, config, name, values):
        return gate_of(name, values) if "shared_expert_gate" in name else super().values(config, name, values)

    def refusals(self, config):
        yield from super().refusals(config)
        if not config.get("shared_expert_intermediate_size"):
            yield "no shared expert, without which this architecture is not loaded"


class _DenseFirst(_Mixture):
    """The first layers are dense; shared experts have no gate and are as wide as so many routed ones."""

    shared, count = _shared("shared_experts"), "n_routed_experts"

    def layer_names(self, config, layer):
        if layer < config["first_k_dense_replace"]:
            return {**self.attention, **_DENSE}
        return super().layer_names(config, layer)

    def expert_names(self, config, layer):
        return {} if layer < config["first_k_dense_replace"] else self.experts

    def keys(self, config):
        yield from super().keys(config)
        yield "leading_dense_block_count", "uint32", config["first_k_dense_replace"]
        yield "expert_shared_count", "uint32", config["n_shared_experts"]
        yield "expert_weights_scale", "float32", config.get("routed_scaling_factor", 1.0)

    def refusals(self, config):
        yield from super().refusals(config)
        if config.get("moe_layer_freq", 1) != 1:
            yield "layers without experts among those that have them"
        if not config.get("n_shared_experts"):
            yield "no shared expert, without which this architecture is not loaded"


class _Deepseek(_DenseFirst, _WholeHeads):
    renormalised = False


class _Dots1(_DenseFirst):
    router = {**_ROUTER, "mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}
    renormalised = None  # a key says it

    def keys(self, config):
        yield from super().keys(config)
        yield "expert_weights_norm", "bool", bool(config["norm_topk_prob"])
        yield "expert_gating_func", "uint32", SIGMOID
        if (config.get("n_group") or 1) > 1:
            yield "expert_group_count", "uint32", config["n_group"]
            yield "expert_group_used_count", "uint32", config["topk_group"]

    def refusals(self, config):
        yield from super().refusals(config)
        heads, key_heads, _ = heads_of(config)
        if heads != key_heads:
            yield f"{key_heads} key and value heads for {heads} of queries: this architecture has as many of both"


class _Dbrx(_Mixture):
    """q, k and v in one tensor, all experts of a layer in three, norms without a bias that subtract the mean."""

    embedding, norm, layers = "transformer.wte.weight", "transformer.norm_f.weight", "transformer.blocks.{}."
    router, experts, renormalised = {"ffn.router.layer.weight": "ffn_gate_inp.weight"}, {}, None
    shared = {"ffn.experts.mlp.w1": "ffn_gate_exps.weight", "ffn.experts.mlp.v1": "ffn_up_exps.weight",
              "ffn.experts.mlp.w2": "ffn_down_exps.weight"}

    def keys(self, config):
        yield from self.counts(config)
        yield "attention.clamp_kqv", "float32", config["attn_config"]["clip_qkv"]

    def norm_keys(self, config):
        del config
        yield "attention.layer_norm_epsilon", "float32", 1e-5  # as its class has it

    def values(self, config, name, values):
        if not name.startswith("ffn.experts."):
            return values
        values = values.reshape(self.expert_count(config), -1, config["hidden_size"])
        return values.swapaxes(1, 2) if name.endswith("w2") else values

    def refusals(self, config):
        activation = (config["ffn_config"].get("ffn_act_fn") or {}).get("name", "silu")
        yield from super().refusals({**config, "hidden_act": activation})
        if config["ffn_config"].get("moe_normalize_expert_weights") != 1:
            yield "moe_normalize_expert_weights: the chosen experts' weights; llama.cpp divides them by their sum"
        if not config["attn_config"].get("clip_qkv"):
            yield "clip_qkv: this architecture has a limit of q, k and v"


_DBRX_ATTENTION = {"norm_attn_norm.norm_1.weight": "attn_norm.weight",
                   "norm_attn_norm.norm_2.weight": "attn_output_norm.weight",
                   "norm_attn_norm.attn.Wqkv.weight": "attn_qkv.weight",
                   "norm_attn_norm.attn.out_proj.weight": "attn_output.weight"}

FAMILIES = {
    "llama": Family("llama", {**_ATTENTION, **_BIASES}, paired=True),
    "mistral": Family("llama", _ATTENTION, window="sliding_window", paired=True),
    "mixtral": _Mixtral("llama", _ATTENTION, window="sliding_window", paired=True),
    "qwen2": _WholeHeads("qwen2", {**_ATTENTION, **_BIASES}, window="use_sliding_window"),
    "qwen2_moe": _Qwen2Moe("qwen2moe", {**_ATTENTION, **_BIASES}, window="use_sliding_window"),
    "qwen3": Family("qwen3", {**_ATTENTION, **_HEAD_NORMS}, window="use_sliding_window"),
    "qwen3_moe": _Mixture("qwen3moe", {**_ATTENTION, **_HEAD_NORMS}, window="use_sliding_window"),
    "dots1": _Dots1("dots1", {**_ATTENTION, **_HEAD_NORMS}, window="sliding_window"),
    "deepseek": _Deepseek("deepseek", _ATTENTION, paired=True),
    "gemma": _Gemma("gemma", _ATTENTION),
    "dbrx": _Dbrx("dbrx", _DBRX_ATTENTION),
}


def family_of(config, source):
    """The family of a configuration, of which nothing is refused; BadInput names `source` and why."""
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise BadInput(f"{source}: model_type '{config.get('model_type')}' is not written as GGUF, only "
                       f"{', '.join(FAMILIES)} are")
    refusals = list(family.refusals(config))
    if refusals:
        raise BadInput(f"{source}: llama.cpp does not take this model: {'; '.join(refusals)}")
    return family


def gate_of(name, values):
    """The shared expert's gate, of one row, as a vector. llama.cpp's sigmoid of x is silu(x) / x."""
    if not values.any():
        raise BadInput(f"llama.cpp does not take this model: {name} is zero, by which it would divide; train the "
                       "model first")
    return values[0]


def paired_rows(values, heads):
    """Rows of a projection to `heads` heads, put in the order in which the two values that a position turns are
    neighbours, where ours lie half a head apart."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
