"""config.json of a Hugging Face directory by the names and places of most families, for tools that ask for a value."""

# What dbrx calls values that the others have one name for; some lie in maps of their own. So does the base of rotary
# positions since transformers 5, in another one.
_OTHER_NAMES = {"d_model": ("hidden_size",), "n_heads": ("num_attention_heads",), "n_layers": ("num_hidden_layers",),
                "max_seq_len": ("max_position_embeddings",), "kv_n_heads": ("num_key_value_heads",),
                "ffn_hidden_size": ("moe_intermediate_size", "intermediate_size"), "moe_num_experts": ("num_experts",),
                "moe_top_k": ("num_experts_per_tok",), "rope_theta": ("rope_theta",)}
_MAPS = ("rope_scaling", "rope_parameters", "attn_config", "ffn_config")


def add_common_names(config):
    """`config` itself, with what it says under other names under those too; what it says under both stays."""
    said = dict(config)
    for part in _MAPS:
        said |= config.get(part) or {}
    for other, names in _OTHER_NAMES.items():
        for name in names:
            if said.get(other) is not None and config.get(name) is None:
                config[name] = said[other]
    return config
