"""Errors in FLOPs, costs and what a run is said to need; see tests/mutants.py."""

MUTANTS = {
    "rows_of_the_embedding_are_multiplied": (
        "trainer/cost/model_cost.cpp", " && (p.role != Role::kEmbedding || p.tied);", ";", "ModelCost.*", "cost_test"),
    "all_experts_are_read_for_a_token": (
        "trainer/cost/roofline.cpp", "bytes * expected_experts(m, tokens) / m.experts", "bytes",
        "Roofline.*", "cost_test"),
    "every_token_of_a_prompt_reads_experts_of_the_last_layer": (
        "trainer/cost/roofline.cpp", "chosen_bytes(m, m.last_routed_bytes, batch);",
        "chosen_bytes(m, m.last_routed_bytes, tokens);", "Roofline.*", "cost_test"),
    "a_step_for_the_token_that_comes_of_the_prompt": (
        "trainer/cost/roofline.cpp", "(output - 1) * decode_seconds", "output * decode_seconds", "Roofline.*",
        "cost_test"),
    "zeros_of_adapters_go_with_the_context": (
        "trainer/cost/roofline.cpp", "rehearse_forward(model, 1).total().attention_flops",
        "rehearse_forward(model, 1).total().model_flops - token_flops", "ModelCost.*", "cost_test"),
    "source_charged_twice": (
        "trainer/cost/claim.cpp", "left = cost - charged,", "left = cost - 2 * charged,", "Claim.*", "cost_test"),
    "flops_of_one_rank_for_all": (
        "trainer/cost/run_curve.cpp", """(number(line, "flops", where) + taught) * ranks""",
        """(number(line, "flops", where) + taught)""", "RunCurves.*", "cost_test"),
    "evaluations_cost_what_was_logged_before_them": (
        "trainer/cost/run_curve.cpp", "if (const double at = number(line, \"step\", where); at > step)",
        "if (const double at = number(line, \"step\", where); at > step && false)", "RunCurves.*", "cost_test"),
    "a_teacher_s_forward_is_size_of_the_model": (
        "trainer/cost/scaling_fit.cpp", "(run.spent.flops - run.teacher_flops)", "run.spent.flops", "ScalingFit.*",
        "cost_test"),
}
