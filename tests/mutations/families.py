"""Errors in model families: their words, their tensors, which of them carries what; see tests/mutants.py."""

MUTANTS = {
    "mixtral_gate_and_up_exchanged": (
        "configs/families/mixtral.cpp",
        """experts.{1}.w1.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.block_sparse_moe.experts.{1}.w2.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.block_sparse_moe.experts.{1}.w3.weight"},""",
        """experts.{1}.w3.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.block_sparse_moe.experts.{1}.w2.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.block_sparse_moe.experts.{1}.w1.weight"},""",
        "*Cases*", "golden_test"),
    "mixtral_not_renormalised": (
        "configs/families/mixtral.cpp", "  c.norm_topk_prob = true;", "  c.norm_topk_prob = false;", "*Cases*",
        "golden_test"),
    "mixtral_with_biases": (
        "configs/families/mixtral.cpp", "  c.qkv_bias = false;", "  c.qkv_bias = true;", "*Cases*", "golden_test"),
    "deepseek_first_layer_a_mixture": (
        "configs/families/deepseek.cpp", '  json.set("first_k_dense_replace", c.first_k_dense_replace);',
        '  json.set("first_k_dense_replace", 0);', "FamilyTensors.*", "hf_model_test"),
    "deepseek_shared_expert_behind_a_gate": (
        "configs/families/experts.cpp", "  c.shared_expert_gate = false;", "  c.shared_expert_gate = true;", "*Cases*",
        "golden_test"),
    "deepseek_one_shared_expert_instead_of_two": (
        "configs/families/experts.cpp", "  c.shared_expert_intermediate_size = shared * c.moe_intermediate_size;",
        "  c.shared_expert_intermediate_size = std::min<std::int64_t>(shared, 1) * c.moe_intermediate_size;",
        "*Deepseek*", "moe_families_test"),
    "auto_asks_nobody_what_it_carries": (
        "configs/families/mixture_choice.cpp", "    if (lacking.none()) return {family, \"\"};\n    tried",
        "    return {family, \"\"};\n    tried", "*", "mixture_choice_test"),
    "dense_layers_in_front_count_as_between": (
        "configs/families/traits.cpp", "first + c.num_moe_layers() < c.num_hidden_layers", "first > 0", "*",
        "mixture_choice_test"),
    "kept_layers_get_the_shared_width": (
        "configs/families/qwen2_moe.cpp", "  const bool all = c.num_moe_layers() == c.num_hidden_layers;",
        "  const bool all = true;", "*", "mixture_choice_test"),
    "shared_expert_doubled_without_a_gate": (
        "upcycle/scale.cpp", "value_or(gate ? 2.0 : 1.0)", "value_or(2.0)", "*", "mixture_families_test"),
    "every_n_begins_at_layer_0": (
        "configs/layer_choice.cpp", "(layer + 1) % choice.count == 0", "layer % choice.count == 0",
        "*", "upcycle_config_test"),
    "dots1_scores_by_a_softmax": (
        "configs/families/dots1.cpp", "  c.router.score = RouterScore::kSigmoid;\n  c.router_bias",
        "  c.router.score = RouterScore::kSoftmax;\n  c.router_bias", "*Cases*", "golden_test"),
    "dots1_without_its_biases": (
        "configs/families/dots1.cpp", "  c.router_bias = true;", "  c.router_bias = false;", "*Cases*", "golden_test"),
    "dots1_opens_every_group": (
        "configs/families/dots1.cpp",
        '  f.integer("topk_group", c.router.group_topk, 1, kMostExpertGroups, false);',
        "  c.router.group_topk = c.router.groups;", "*Cases*", "golden_test"),
    "dots1_factor_not_read": (
        "configs/families/dots1.cpp", '  f.number("routed_scaling_factor", c.router.scale, false, false);\n', "",
        "*Cases*", "golden_test"),
    "dots1_window_of_a_file_without_a_word": (
        "configs/families/dots1.cpp", '  json.set_null("sliding_window");  // without the key there would be one\n',
        '  json.erase("sliding_window");\n', "*Dots1*", "moe_families_test"),
    "biases_of_routers_rounded_to_bf16": (
        "data/hf_names.cpp", "  tensor.fp32 = p.fp32;\n", "", "*Fp32*", "hf_model_test"),
    "sigmoids_scaled_as_a_softmax": (
        "upcycle/scale.cpp", "score == RouterScore::kSigmoid ? 2 : config.target.num_experts",
        "config.target.num_experts", "Scale.*", "unit_map_test"),
    "softmax_exported_as_sigmoid": (
        "configs/router_record.cpp", "  const Traits lost = without_words(c).without({Trait::kChoiceBias});",
        "  const Traits lost = without_words(c).without({Trait::kChoiceBias, Trait::kSoftmaxScores});",
        "FamilyTensors.*", "hf_model_test"),
    "keys_before_queries_in_one_tensor": (
        "configs/families/dbrx.cpp", """    {Role::kQuery, Half::kWhole, kQkv},
    {Role::kKey, Half::kWhole, kQkv},""", """    {Role::kKey, Half::kWhole, kQkv},
    {Role::kQuery, Half::kWhole, kQkv},""", "*Cases*", "golden_test"),
    "down_projections_not_transposed": (
        "configs/families/dbrx.cpp", '"transformer.blocks.{0}.ffn.experts.mlp.w2", true}',
        '"transformer.blocks.{0}.ffn.experts.mlp.w2"}', "FamilyTensors.*", "hf_model_test"),
    "transposed_in_the_reader_alone": (
        "data/hf_writer.cpp", "  if (!t.transposed) return", "  return", "FamilyTensors.*", "hf_model_test"),
    "limit_of_another_dbrx": (
        "configs/families/dbrx.cpp", '  f.number("clip_qkv", c.clip_qkv, true, false);', "  c.clip_qkv = 8;",
        "*Cases*", "golden_test"),
    "limit_without_a_mask": (
        "trainer/model/attention_layer.cpp",
        "  if (clip > 0) ops::clip_backward(ex, dqkv_TH, saved.before_TH, clip);\n", "", "*Limited*",
        "layer_gradient_test"),
    "limit_after_the_rotation": (
        "trainer/model/attention_layer.cpp",
        "  if (clip > 0) ops::clip(ex, saved.qkv_TH, saved.before_TH, clip);\n"
        "  ops::rope(ex, saved.qkv_TH, places.positions_T, at, rope_theta, /*inverse=*/false);",
        "  ops::rope(ex, product_TH, places.positions_T, at, rope_theta, /*inverse=*/false);\n"
        "  if (clip > 0) ops::clip(ex, saved.qkv_TH, saved.before_TH, clip);", "*Cases*", "golden_test"),
    "mean_left_in_the_gradient": (
        "kernels/cpu/layer_norm.cpp", " - g_mean - n_i * gn_mean)", " - n_i * gn_mean)", "*", "layer_norm_test"),
    "epsilon_of_other_norms": (
        "configs/families/dbrx.cpp", "constexpr double kEps = 1e-5;", "constexpr double kEps = 1e-6;",
        "*Dbrx*", "moe_families_test"),
}
