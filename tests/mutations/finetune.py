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
    "frozen_experts_keep_their_rows": (
        "trainer/model/experts.h", "return gate_up_eGD.wants_grad() || !keeps.gate_up;", "return true;",
        "FrozenCost.*", "freeze_test"),
    "rows_for_gate_up_made_again_are_gone": (
        "trainer/model/experts.h", "return gate_up_eGD.wants_grad() || !keeps.gate_up;",
        "return gate_up_eGD.wants_grad();", "*Frozen*", "freeze_test"),
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
        "trainer/model/attention_layer.cpp", "  if (qkv.weight_NK.wants_grad()) x.emplace", "  x.emplace",
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
}
