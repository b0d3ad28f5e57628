// upmoe study: a claim tested as arms x paired seeds. Everything but this command line is launch/study.py, which starts
// this program again for each training, upcycling and evaluation.

#include <filesystem>

#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/python_tool.h"

namespace upmoe {

namespace {

struct StudyArguments {
  std::string name, size = "micro", plant, text, out;
  int seeds = 3;
  bool list = false, dry = false;
};

int run_study(const StudyArguments& a, Runtime& runtime) {
  Communicator& world = runtime.world();
  run_agreed(world, [&] {
    if (world.size() != 1 && world.rank() == 0)
      fail(ExitCode::kUsage,
           "upmoe study starts its runs itself, one after another: start it alone, not on {} ranks",
           world.size());
  });
  std::vector<std::string> words{"--upmoe", std::filesystem::read_symlink("/proc/self/exe").string(),
                                 "--size",  a.size,
                                 "--seeds", std::to_string(a.seeds)};
  if (!a.plant.empty()) words.insert(words.end(), {"--plant", a.plant});
  if (!a.text.empty()) words.insert(words.end(), {"--text", a.text});
  if (!a.out.empty()) words.insert(words.end(), {"--out", a.out});
  if (a.list) words.emplace_back("--list");
  if (a.dry) words.emplace_back("--dry");
  if (!a.name.empty()) words.insert(words.end(), {"--", a.name});
  return run_python_tool("study.py", words);
}

}  // namespace

void add_study(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<StudyArguments>();
  CLI::App* command = app.add_subcommand(
      "study", "Test a claim: arms x paired seeds, curves with bands, intervals and a verdict");
  as_path(command->add_option("name", a->name, "A study of configs/studies, or a file"));
  command->add_option("--size", a->size, "Of models, data and steps")
      ->check(CLI::IsMember({"micro", "tiny", "small"}))
      ->capture_default_str();
  command->add_option("--seeds", a->seeds, "Pairs of runs")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_flag("--list", a->list, "The studies there are");
  command->add_flag("--dry", a->dry, "Probe the arms, print the plan (FLOPs, minutes, disk) and stop");
  command->add_option(
      "--plant", a->plant,
      "Test of the study itself: this arm against the same with a tenth of its learning rate");
  as_path(command->add_option("--text", a->text, "Folder of text files instead of the study's first text"));
  as_path(command->add_option("--out", a->out, "Folder of everything (default: runs/study/NAME/SIZE)"));
  command->callback([a, &handler] {
    if (a->name.empty() && !a->list)
      throw CLI::ValidationError("name", "a study's name is missing; --list shows them");
    handler = [a](Runtime& runtime) { return run_study(*a, runtime); };
  });
}

}  // namespace upmoe
