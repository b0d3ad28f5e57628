// The `upmoe` program: picks the subcommand, starts the ranks, prints an error once and turns it into an exit status.

#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <sstream>
#include <thread>

#include "kernels/core/log.h"
#include "kernels/core/system_error.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/output.h"

namespace {

int run(int argc, char** argv) {
  CLI::App app{
      "upmoe: turns a dense language model into a fine-grained mixture of experts and pretrains it."};
  app.require_subcommand(1);
  app.footer(
      "Every key of a run configuration: upmoe train --help. Every key of a recipe: upmoe upcycle --help.\n"
      "Exit status: 0 done, 1 unexpected failure, 2 usage or configuration, 3 bad input, 4 not finite,\n"
      "70 hang, 71 device, 72 a rank died, 75 stopped on request with a complete checkpoint.");
  app.set_version_flag("--version", std::string("upmoe ") + UPMOE_VERSION);
  upmoe::Handler handler;
  upmoe::add_upcycle(app, handler);
  upmoe::add_train(app, handler);
  upmoe::add_eval(app, handler);
  upmoe::add_generate(app, handler);
  upmoe::add_export(app, handler);
  upmoe::add_inspect(app, handler);
  upmoe::add_cost(app, handler);
  upmoe::add_doctor(app, handler);
  upmoe::add_plan(app, handler);
  upmoe::add_report(app, handler);
  upmoe::add_study(app, handler);
  double deadline_s = 600;
  for (const char* command : {"upcycle", "train", "eval", "generate", "export"})
    app.get_subcommand(command)
        ->add_option("--deadline", deadline_s,
                     "Seconds without progress after which the job ends with status 70 (0: never)")
        ->check(upmoe::zero_or_above())
        ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() != 0)
      upmoe::fail(upmoe::ExitCode::kUsage, "{}", upmoe::explain(app, argc, argv, e));
    std::ostringstream help;
    app.exit(e, help, help);
    upmoe::print_result(help.str());
    return 0;
  }

  const bool works = app.get_subcommands().front()->get_option_no_throw("--deadline") != nullptr;
  upmoe::Runtime runtime(&argc, &argv,
                         std::chrono::milliseconds(works ? static_cast<std::int64_t>(deadline_s * 1000) : 0));
  try {
    upmoe::log::start(runtime.world().rank());
    if (const std::string wrong = complaint(runtime.cores());
        works && runtime.cores().speaks && !wrong.empty())
      upmoe::log::warning("{}", wrong);
    return upmoe::with_system_errors([&] { return handler(runtime); });
  } catch (const upmoe::PeerError& e) {  // the rank that met it prints it
    runtime.end_after_peer(static_cast<int>(e.code()));
  } catch (const upmoe::Error& e) {
    runtime.abort(static_cast<int>(e.code()), e.what());
  } catch (const std::bad_alloc&) {
    runtime.abort(1, "out of memory; lower train.micro_batch or use more ranks");
  } catch (const std::exception& e) {
    runtime.abort(1, e.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  upmoe::hold_standard_streams();
  // A closed pipe, and a file beyond `ulimit -f`, are errors of the write, not the end of a training run.
  for (const int number : {SIGPIPE, SIGXFSZ}) std::signal(number, SIG_IGN);
  try {
    return run(argc, argv);
  } catch (const upmoe::Error& e) {  // before the ranks were up: each finds the same, and one speaks
    if (upmoe::announced_rank() == 0) {
      std::fprintf(stderr, "%supmoe: error: %s\n", upmoe::log::timestamp().c_str(), e.what());
    } else {  // a launcher ends the whole job with the first rank; let the one that speaks be that
      std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    }
    return static_cast<int>(e.code());
  }
}
