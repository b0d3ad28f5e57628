"""config.json of a Hugging Face directory by the names of most families, for tools that ask for a width or a length."""

# What dbrx calls values that the others have one name for; some lie in maps of their own.
_OTHER_NAMES = {"d_model": ("hidden_size",), "n_heads": ("num_attention_heads",), "n_layers": ("num_hidden_layers",),
                "max_seq_len": ("max_position_embeddings",), "kv_n_heads": ("num_key_value_heads",),
                "ffn_hidden_size": ("moe_intermediate_size", "intermediate_size"), "moe_num_experts": ("num_experts",),
                "moe_top_k": ("num_experts_per_tok",)}


def add_common_names(config):
    """`config` itself, with what it says under other names under those too; what it says under both stays."""
    said = {**config, **config.get("attn_config", {}), **config.get("ffn_config", {})}
    for other, names in _OTHER_NAMES.items():
        for name in names:
            if other in said and name not in config:
                config[name] = said[other]
    return config
