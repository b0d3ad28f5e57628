// upmoe report: pictures of one run or several. Drawing is Python's work (launch/report.py, matplotlib).

#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/python_tool.h"

namespace upmoe {

namespace {

struct ReportArguments {
  std::vector<std::string> runs, labels;
  std::string out, against = "tokens", group = "run", band;
  bool continued = false;
};

int run_report(const ReportArguments& a, Runtime& runtime) {
  if (runtime.world().rank() != 0) return 0;  // under mpirun the first rank draws
  std::vector<std::string> words{"--against", a.against, "--group", a.group};
  if (!a.band.empty()) words.insert(words.end(), {"--band", a.band});
  if (!a.out.empty()) words.insert(words.end(), {"--out", a.out});
  for (const std::string& label : a.labels) words.insert(words.end(), {"--label", label});
  if (a.continued) words.emplace_back("--continued");
  words.emplace_back("--");
  words.insert(words.end(), a.runs.begin(), a.runs.end());
  return run_python_tool("report.py", words);
}

}  // namespace

void add_report(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<ReportArguments>();
  CLI::App* command = app.add_subcommand(
      "report", "What runs were and did: one self-contained HTML page, and pictures as PNG");
  as_path(
      command->add_option("runs", a->runs, "Run directories; several are laid over each other")->required());
  as_path(command->add_option("--out", a->out,
                              "Folder for the results (default: report/ in the first run directory)"));
  command
      ->add_option("--against", a->against,
                   "Horizontal axis of the pictures, and the page's at first: tokens, flops, seconds or step")
      ->check(CLI::IsMember({"tokens", "flops", "seconds", "step"}))
      ->capture_default_str();
  command->add_option("--label", a->labels, "Name of a run, once per run (default: its folder's name)")
      ->take_all()
      ->allow_extra_args(false);
  command->add_flag("--continued", a->continued,
                    "The first run is where the others started: draw them from its end on");
  command
      ->add_option("--group", a->group,
                   "arm: one line, their mean, for the runs of one label, or of one arm of a study")
      ->check(CLI::IsMember({"run", "arm"}))
      ->capture_default_str();
  command
      ->add_option("--band", a->band,
                   "With --group arm: ci, the 95 % interval of the mean around it (the default), or none")
      ->check(CLI::IsMember({"ci", "none"}));
  command->callback([a, &handler] { handler = [a](Runtime& runtime) { return run_report(*a, runtime); }; });
}

}  // namespace upmoe
