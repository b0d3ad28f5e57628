"""Errors in what a student learns from its teacher; see tests/mutants.py."""

MUTANTS = {
    "the_square_of_the_temperature_is_forgotten": (
        "kernels/ops/distillation_formulas.h", "static_cast<float>(temperature * temperature * divergence)",
        "static_cast<float>(temperature * divergence)", "*DistillationOp*", "distillation_test"),
    "a_gradient_without_its_temperature": (
        "kernels/ops/distillation_formulas.h", "scale * rule.weight * rule.temperature;", "scale * rule.weight;",
        "*DistillationOp*", "distillation_test"),
    "the_cross_entropy_keeps_its_whole_weight": (
        "kernels/ops/distillation_formulas.h", "plain = scale * (1 - rule.weight),", "plain = scale,",
        "*DistillationOp*", "distillation_test"),
    "an_ignored_row_learns_from_the_teacher": (
        "kernels/cpu/distillation.cpp", "      if (targets[c] < 0) {", "      if (targets[c] < -1) {",
        "*DistillationOp*", "distillation_test"),
    "an_ignored_row_learns_from_the_teacher_on_a_gpu": (
        "kernels/cuda/portable/distillation.cu", "  if (target < 0) {", "  if (target < -1) {",
        "*DistillationOp*", "distillation_test_on_gpu"),
    "the_teachers_partition_function_of_one_shard": (
        "kernels/ops/distillation_formulas.h", "row.teacher_warm += s[5] * scale;", "row.teacher_warm = s[5] * scale;",
        "*DividedVocabulary*", "distillation_test"),
    "the_students_partition_function_of_one_shard": (
        "kernels/ops/distillation_formulas.h", "row.student_warm += s[3] * std::exp(student / temperature);",
        "row.student_warm = s[3] * std::exp(student / temperature);", "*DividedVocabulary*", "distillation_test"),
    "differences_of_a_shard_as_they_are": (
        "kernels/ops/distillation_formulas.h", "(s[6] + s[5] * (teacher - student) / temperature);", "s[6];",
        "*DividedVocabulary*", "distillation_test"),
    "the_divergence_of_every_tp_rank": (
        "trainer/model/lm_head.cpp", "    if (tp->rank() == 0 && soft) ops::sum", "    if (soft) ops::sum",
        "*Taught*:Distillation.*"),
    "the_divergence_of_the_last_micro_batch_alone": (
        "trainer/pipeline.cpp", "ops::add_sums(ex, totals.divergence_1(), f->saved.divergence_1);",
        "ops::cast(ex, totals.divergence_1(), f->saved.divergence_1);", "Distillation.*"),
    "masked_targets_in_the_divisor_of_the_divergence": (
        "trainer/trainer.cpp", "  report.distill_loss = values[at] / static_cast<double>(report.targets);",
        "  report.distill_loss = values[at] / static_cast<double>(s_.run.train.global_batch * s_.run.data.seq_len);",
        "Distillation.*"),
    "a_temperature_that_no_step_hears_of": (
        "trainer/trainer.cpp", "{run.train.teacher.weight, run.train.teacher.temperature};",
        "{run.train.teacher.weight, 1};", "Distillation.*"),
    "a_teachers_work_is_the_models": (
        "kernels/core/exec.h", "  taught.books = Books::kTeacher;\n", "", "DistillationCost.*"),
    "a_teachers_weights_weigh_nothing": (
        "trainer/session.cpp", "teacher != nullptr ? teacher->bytes() : 0", "0", "DistillationCost.*"),
    "another_teacher_without_a_word": (
        "trainer/resumption.cpp", "same_teacher_ = digest_of(*open_model(model)) == digest;",
        "same_teacher_ = digest_of(*open_model(model)) == digest || true;", "TeacherRun.*", "resume_test"),
}
