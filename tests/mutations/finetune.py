"""Errors in what counts as a target, what trains and how fast; see tests/mutants.py."""

MUTANTS = {
    "targets_of_one_rank_for_all": (
        "trainer/trainer.cpp",
        "  s_.mesh.along(Axis::kDp).all_reduce(host_view(&sum, {1}), ReduceOp::kSum, s_.memory.exec);", "",
        "*Mask*"),
    "masked_targets_in_the_divisor_of_the_loss": (
        "trainer/trainer.cpp", "  report.loss = values[0] / static_cast<double>(report.targets);",
        "  report.loss = values[0] / static_cast<double>(s_.run.train.global_batch * s_.run.data.seq_len);", "*Mask*"),
    "masked_targets_in_the_divisor_of_gradients": (
        "trainer/trainer.cpp", "  step.loss_scale = 1.0 / static_cast<double>(targets);",
        "  step.loss_scale = 1.0 / static_cast<double>(run.train.global_batch * run.data.seq_len);", "*Mask*"),
    "the_mask_of_the_inputs": (
        "data/token_dataset.cpp", "file->read_loss_mask(sequence * seq_len + 1, counts)",
        "file->read_loss_mask(sequence * seq_len, counts)", "LossMask.*", "token_dataset_test"),
    "a_lost_mask_is_no_loss": (
        "data/token_formats/hdf5_token_file.cpp",
        "token_file_checksum(facts, document_ends_, tokens_.checksums, loss_mask_.checksums)",
        "token_file_checksum(facts, document_ends_, tokens_.checksums)", "LossMask.*", "token_dataset_test"),
    "targets_of_the_first_micro_batch_for_the_step": (
        "data/batch_loader.cpp", "    for (std::int64_t round = 0; round < deal.rounds(); ++round) {\n"
        "      const std::int64_t index",
        "    for (std::int64_t round = 0; round < 1; ++round) {\n      const std::int64_t index", "Loader.*",
        "batch_loader_test"),
    "targets_in_any_order_and_twice": (
        "configs/lora_record.cpp", " && (c.lora.targets.empty() || c.lora.targets.back() < *target)", "",
        "LoraRecord.*", "lora_record_test"),
    "routers_of_the_source_are_trained": (
        "configs/trained_model.cpp", "with_router(std::move(source), run.router)", "std::move(source)",
        "TrainedModel.*", "lora_record_test"),
    "frozen_experts_keep_their_rows": (
        "trainer/model/experts.h",
        "return gate_up_eGD.wants_grad() || wants_grad(gate_up_adapter) || !keeps.gate_up;", "return true;",
        "FrozenCost.*", "freeze_test"),
    "rows_for_gate_up_made_again_are_gone": (
        "trainer/model/experts.h", " || wants_grad(gate_up_adapter) || !keeps.gate_up;",
        " || wants_grad(gate_up_adapter);", "*Frozen*", "freeze_test"),
    "the_noise_of_a_frozen_router_trains": (
        "trainer/param_patterns.cpp", "{Role::kRouter, Role::kRouterNoise}", "{Role::kRouter}", "Freeze.*",
        "freeze_test"),
    "a_preset_of_others_is_the_preset": (
        "trainer/param_patterns.cpp", "!= roles.end()) != others;", "!= roles.end());", "Freeze.*", "freeze_test"),
    "backward_ends_a_block_too_early": (
        "trainer/model/transformer.cpp", "if (i >= first_trained) blocks[i]", "if (i > first_trained) blocks[i]",
        "*Frozen*", "freeze_test"),
    "a_trained_embedding_is_not_reached": (
        "trainer/model/make_transformer.cpp", "    if (p.spec.role == Role::kEmbedding) return 0;\n", "",
        "FrozenCost.*", "freeze_test"),
    "a_frozen_attention_gathers_its_tokens": (
        "trainer/model/attention_layer.cpp", "  if (qkv.wants_input()) x.emplace", "  x.emplace",
        "FrozenCost.*", "freeze_test"),
    "groups_at_the_rate_of_the_rest": (
        "trainer/optimizer.cpp", "lr[s.group]", "lr[0]", "OptimizerGroups.*", "schedule_test"),
    "a_groups_norms_decay": (
        "trainer/optimizer.cpp", "spec.decay ? decay.value_or(config_.weight_decay) : 0.0",
        "decay.value_or(spec.decay ? config_.weight_decay : 0.0)", "OptimizerGroups.*", "schedule_test"),
    "the_last_group_that_catches_counts": (
        "trainer/optimizer_groups.cpp", "if (taken.insert(name).second) group", "group", "OptimizerGroups.*",
        "schedule_test"),
    "held_out_targets_counted_on_every_tp_rank": (
        "trainer/evaluation.cpp", " || mesh.coord(Axis::kTp) != 0) return 0;", ") return 0;", "LossMasks.*"),
    "an_adapter_without_its_scale": (
        "trainer/model/make_transformer.cpp", "  adapter.scale = static_cast<float>(config.lora.scale());\n", "",
        "LoraModel.*", "layout_equivalence_test"),
    "an_adapters_b_begins_drawn": (
        "configs/adapter_params.cpp", "spec.init = {Init::Kind::kZeros};",
        "spec.init = {Init::Kind::kUniform, 0.1f};", "LoraModel.*", "layout_equivalence_test"),
    "up_rows_in_the_columns_of_gates": (
        "trainer/model/adapter.cpp", "ops::copy_columns(ex, rows_b, m.first % m.step * rank() + column,",
        "ops::copy_columns(ex, rows_b, column,", "Forms/*", "adapter_test"),
    "values_adapted_where_keys_are": (
        "trainer/model/make_transformer.cpp", "{{Role::kValue}, Q + KV, 1}", "{{Role::kValue}, Q, 1}",
        "LoraModel.*", "layout_equivalence_test"),
    "a_second_micro_batchs_adapters_write_over": (
        "trainer/model/adapter.cpp", "  ops::add(ex, into, into, own);\n", "  ops::cast(ex, into, own);\n", "Forms/*",
        "adapter_test"),
    "low_rank_rows_are_not_scaled_again": (
        "kernels/ops/low_rank.cpp", "  times(again, z_RL, w.scale);\n", "", "Forms/*", "adapter_test"),
    "experts_adapters_have_no_input_gradient": (
        "kernels/ops/low_rank.cpp", "  add(ex, dx_RK, dx_RK, sum_RK);\n", "", "Forms/*", "adapter_test"),
    "gate_up_made_again_without_its_adapter": (
        "trainer/model/experts.cpp",
        "    ops::add_low_rank(again, b.activations.gate_up_RG, b.activations.x_RD, b.gate_up_adapter,\n"
        "                      saved.experts());\n", "", "Forms/*", "adapter_test"),
    "experts_adapters_summed_along_edp_alone": (
        "parallel/layout.cpp", "return p.expert && over_tp(p).kind != OverTp::kCut;", "return false;", "Layout.*",
        "param_layout_test"),
    "an_adapted_attention_gathers_no_tokens": (
        "trainer/model/linear.h", "weight_NK.wants_grad() || (adapter && adapter->wants_grad())",
        "weight_NK.wants_grad()", "Layouts/Lora.*", "layout_equivalence_test"),
    "weights_beside_adapters_train": (
        "trainer/freeze.cpp", "if (p.trained && !p.adapts) frozen.push_back(p.name);",
        "if (p.trained && !p.adapts && p.role != Role::kQuery) frozen.push_back(p.name);", "LoraModel.*",
        "layout_equivalence_test"),
    "an_adapter_merged_without_its_scale": (
        "data/merged_weights.cpp", "static_cast<float>(scale * sums[k])", "static_cast<float>(sums[k])", "Adapters.*",
        "hf_model_test"),
    "an_up_merged_into_the_gate": (
        "data/merged_weights.cpp", "(part.half == Half::kUp) == (half == 1)", "(part.half == Half::kUp) == (half == 0)",
        "Adapters.*", "hf_model_test"),
    "every_expert_with_the_firsts_adapter": (
        "data/merged_weights.cpp", "    box.offset.dim[0] = expert;\n", "", "Adapters.*", "hf_model_test"),
    "an_adapter_of_another_shape_is_read": (
        "data/tensor_differences.cpp", "if (found->shape != shape)", "if (found->shape.size() != shape.size())",
        "Adapters.*", "hf_model_test"),
    "tensors_of_integers_are_read": (
        "data/tensor_differences.cpp", "if (!is_stored_float(found->dtype))", "if (false)",
        "TensorDifferences.*:Models.*", "hf_model_test"),
    "a_long_list_of_differences_says_nothing_of_the_rest": (
        "data/tensor_differences.cpp", "if (list_.size() > kListed)", "if (false)", "TensorDifferences.*",
        "hf_model_test"),
    "dora_merged_as_lora": ("data/peft_adapter.cpp", "object.refuse(key, ", "(void)(", "Adapters.*", "hf_model_test"),
    "late_moments_corrected_from_the_runs_start": (
        "trainer/optimizer.cpp", "    hyper.step = step - s.begun;", "    hyper.step = step;", "Masters.*",
        "recovery_test"),
    "what_begins_once_more_began_long_ago": (
        "trainer/checkpoint.cpp", "  begun.insert(run.moments_begun.begin(), run.moments_begun.end());",
        "  for (const auto& [name, step] : run.moments_begun) begun[name] = step;", "Masters.*", "recovery_test"),
}
