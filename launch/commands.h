#pragma once
// The subcommands of `upmoe`. Each add_x() declares one on the command line; when it was chosen, it sets
// `handler`, which main runs on every rank and whose result is the exit status. A handler is a composition
// root: it reads configuration, builds objects, runs them, and holds no logic of its own.

#include <CLI/CLI.hpp>
#include <functional>

#include "parallel/runtime.h"

namespace upmoe {

using Handler = std::function<int(Runtime&)>;

void add_upcycle(CLI::App& app, Handler& handler);
void add_train(CLI::App& app, Handler& handler);
void add_eval(CLI::App& app, Handler& handler);
void add_generate(CLI::App& app, Handler& handler);
void add_cost(CLI::App& app, Handler& handler);
void add_doctor(CLI::App& app, Handler& handler);
void add_plan(CLI::App& app, Handler& handler);
void add_export(CLI::App& app, Handler& handler);
void add_inspect(CLI::App& app, Handler& handler);
void add_report(CLI::App& app, Handler& handler);
void add_study(CLI::App& app, Handler& handler);

}  // namespace upmoe
