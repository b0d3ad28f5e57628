"""Errors in what a machine is said to be, to reach and to need for a run; see tests/mutants.py."""

MUTANTS = {
    "a_law_fitted_to_six_times_the_size": (
        "trainer/cost/scaling_fit.cpp", "(run.spent.flops - run.teacher_flops) / run.spent.tokens / 6,",
        "(run.spent.flops - run.teacher_flops) / run.spent.tokens,", "ScalingFit.*", "cost_test"),
    "amplitudes_below_zero": (
        "trainer/cost/scaling_fit.cpp", "[](double v) { return v < 0; })) continue;",
        "[](double v) { return v < -1e9; })) continue;", "ScalingFit.*", "cost_test"),
    "the_middle_of_the_tokens_forgotten": (
        "trainer/cost/scaling_fit.cpp", "-(c2 - c3 * x0), c3};", "-c2, c3};", "ScalingFit.*", "cost_test"),
    "a_source_charged_with_the_mixtures_tokens": (
        "trainer/cost/claim.cpp", "n_source * facts.source_tokens : 0", "n_source * facts.tokens : 0", "Claim.*",
        "cost_test"),
    "a_later_mount_does_not_cover_an_earlier_one": (
        "trainer/diagnosis/folder_facts.cpp", "mounted.native().size() < longest", "mounted.native().size() <= longest",
        "Folder.*", "diagnosis_test"),
    "ranks_need_no_connections": (
        "trainer/diagnosis/findings.cpp", "static_cast<std::uint64_t>(ranks - 1),",
        "static_cast<std::uint64_t>(0 * ranks),", "Findings.*", "diagnosis_test"),
    "one_rank_wants_shared_memory": (
        "trainer/diagnosis/findings.cpp", "  if (ranks_here == 1) return;", "", "Findings.*", "diagnosis_test"),
    "the_soft_limit_is_the_hard_one": (
        "trainer/diagnosis/host_facts.cpp", "return {number(soft), number(hard)};",
        "return {number(hard), number(hard)};", "PlantedHost.*", "diagnosis_test"),
    "a_node_has_the_gpus_that_one_rank_is_shown": (
        "trainer/diagnosis/machine_facts.cpp", "std::max({host.gpus, where.gpus, where.ranks_here});", "where.gpus;",
        "MachineFacts.*", "diagnosis_test"),
    "a_gpu_is_charged_with_the_hosts_memory": (
        "trainer/diagnosis/machine_facts.cpp", "    machine.overhead_gb = 0;",
        "    machine.overhead_gb = four_digits(host.resident * 1e-9);", "MachineFacts.*", "diagnosis_test"),
    "every_rank_speaks_for_its_host": (
        "parallel/host.cpp", "- hosts.begin() == rank};", "- hosts.begin() <= rank};", "HostPlace.*", "threads_test"),
    "a_trial_is_left_behind": (
        "trainer/diagnosis/folder_facts.cpp", "    fs::remove_all(path_, ignored);", "", "Folder.*", "diagnosis_test"),
    "transfers_beside_nothing": (
        "trainer/plan/step_clock.cpp", "  wire_.push_back(under_way);", "", "Clock.*", "plan_test"),
    "all_bytes_stay_inside_the_node": (
        "trainer/plan/step_clock.cpp", "    bytes.between = t.each * (all - here);",
        "    bytes.inside = t.each * (all - 1);", "Clock.*", "plan_test"),
    "other_micro_batches_cost_nothing": (
        "trainer/plan/run_plan.cpp", "    rank.step.add(rank.micro_batch, more);", "", "Plan.*", "plan_test"),
    "a_teacher_of_one_micro_batch": (
        "trainer/plan/run_plan.cpp", "micro_batches * cost.teacher_flops}", "cost.teacher_flops}", "Plan.*",
        "plan_test"),
    "bytes_of_other_micro_batches_forgotten": (
        "kernels/core/ledger.cpp", "  bytes_read += times * o.bytes_read;", "", "Plan.*", "plan_test"),
    "mixing_tokens_takes_no_products": (
        "kernels/ops/token_groups.cpp", "bytes_of(mix_MD),\n          Work::kGroupedProducts);",
        "bytes_of(mix_MD),\n          Work::kRowSums);", "Rehearsal.OpsSay*", "rehearsal_test"),
    "attention_counts_as_a_product": (
        "kernels/core/ledger.cpp", ".attention_flops = is_attention(work) ? flops : 0",
        ".attention_flops = is_of_model(work) ? flops : 0", "LedgerBook.*", "core_test"),
    "the_search_keeps_the_runs_chunks": (
        "trainer/plan/layout_search.cpp", "      run.parallel.pp_chunks = LayoutSearch::kChunks;", "",
        "LayoutSearch.*", "plan_test"),
    "a_mesh_that_does_not_fit_is_counted_twice": (
        "trainer/plan/layout_search.cpp", "        ++found_.excluded.too_large;",
        "        found_.excluded.too_large += 2;", "LayoutSearch.*", "plan_test"),
    "a_pipeline_without_a_bubble": (
        "trainer/plan/run_plan.cpp", "    if (stage != slowest.stage) bubble += seconds / chunks;", "", "Plan.*",
        "plan_test"),
    "ranks_of_one_share_size": (
        "trainer/plan/run_plan.cpp", "mesh.coord(rank, Axis::kEp), mesh.coord(rank, Axis::kEtp)}];", "0, 0}];",
        "Plan.*", "plan_test"),
    "attention_at_the_rate_of_its_forward": (
        "trainer/plan/rank_speed.cpp", "r.attention_backward_bf16 : r.attention_backward_fp32",
        "r.attention_forward_bf16 : r.attention_backward_fp32", "RankSpeed.*", "plan_test"),
    "a_machines_memory_as_it_is_sold": (
        "trainer/plan/rank_speed.cpp", "machine_.usable_gb > 0 ?", "machine_.usable_gb < 0 ?", "PlanRecords.*",
        "plan_test"),
}
