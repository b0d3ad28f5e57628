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
    "a_start_that_begins_anew_keeps_another_one_s_evaluation": (
        "trainer/metrics.cpp", "return from_step > 0 ? from_step + 1 : 0;", "return from_step + 1;", "Metrics.*",
        "estimates_test"),
    "events_of_steps_that_are_computed_again_stay": (
        "trainer/event_file.cpp", "  record(start);\n", "", "Metrics.*", "estimates_test"),
    "what_a_full_disk_refused_is_forgotten": (
        "trainer/appended_file.cpp", "  pending_ += record;", "  pending_ = record;", "*", "appended_file_test"),
    "a_milestone_goes_when_it_is_no_longer_new": (
        "trainer/checkpoint_keeper.cpp", "      if (is_milestone(u) || is_one_of", "      if (is_one_of", "Retention.*",
        "recovery_test"),
    "a_full_disk_takes_milestones": (
        "trainer/checkpoint_keeper.cpp", "return is_milestone(u) || is_one_of", "return is_one_of", "Retention.*",
        "recovery_test"),
    "milestones_count_as_the_newest": (
        "trainer/checkpoint_keeper.cpp", "[&](const Usable& u) { return is_milestone(u); }), old);",
        "[&](const Usable&) { return false; }), old);", "Retention.*", "recovery_test"),
}
