"""Errors in what a run writes down of itself; see tests/mutants.py."""

MUTANTS = {
    "sets_weigh_alike_whatever_they_hold": (
        "trainer/held_out.cpp", "of.result.loss * static_cast<double>(of.result.tokens);", "of.result.loss;",
        "HeldOut.*", "resume_test"),
    "a_resume_forgets_the_starts_before_it": (
        "trainer/run_record.cpp", "  if (goes_on) {\n    std::ifstream in(path",
        "  if (!goes_on) {\n    std::ifstream in(path",
        "Resume.*Recorded", "resume_test"),
    "a_start_at_the_step_before": (
        "trainer/run_record.cpp", """{"first_step", state.step + 1}""", """{"first_step", state.step}""",
        "Resume.*Recorded", "resume_test"),
}
