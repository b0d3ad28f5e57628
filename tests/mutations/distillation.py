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
}
