#pragma once
// `upmoe inspect MODEL TOKENS... --routing`: which experts fire for which source, place and kind of token.

#include <cstdint>
#include <string>
#include <vector>

#include "configs/run_choices.h"

namespace upmoe {

struct RoutingRequest {
  std::string model;
  std::vector<std::string> tokens;                              // files; each is a source
  std::int64_t seq_len = 256, sequences = 64, micro_batch = 4;  // sequences of each source; 0: all
  Precision precision = Precision::kFp32;
  std::string out;  // folder for routing.json and routing.png; empty: none
};

// On this rank alone, on the CPU. Prints the counts, as one JSON object or as a table; the exit status.
int inspect_routing(const RoutingRequest& request, bool as_json);

}  // namespace upmoe
