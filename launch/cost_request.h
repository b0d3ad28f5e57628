#pragma once
// What `upmoe cost` is asked for: one of six reports, and the options that go with it. --claim takes --run: its report
// then has what the runs measured.

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "configs/run_choices.h"

namespace upmoe {

enum class CostKind { kModels, kPublished, kClaim, kRuns, kFit, kInference };

struct CostRequest {
  CostKind kind = CostKind::kModels;
  std::vector<std::string> models, runs, fitted, sources;
  std::string machine;  // empty: none was named
  std::int64_t seq_len = 4096;
  std::int64_t prompt = 1000, output = 1000;  // tokens of a request, of kInference
  double tokens = 0;                          // 0: not asked
  double mfu = 0.4;
  Recompute recompute = Recompute::kNone;
  bool as_json = false;
};

// Declares the options; their values stand in the request when the command line has been read.
std::shared_ptr<CostRequest> add_cost_options(CLI::App& command);

// Which report it is. Nothing was asked: throws CLI::CallForHelp. Options that do not go together: throws
// Error(kUsage) that says which, and what they go with.
void settle_cost_request(const CLI::App& command, CostRequest& request);

}  // namespace upmoe
