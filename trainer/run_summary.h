#pragma once
// What is going to happen, in a few lines before the first step: rank 0 says it.

#include <span>
#include <string>
#include <vector>

#include "configs/config_diff.h"
#include "trainer/checkpoint.h"
#include "trainer/held_out.h"
#include "trainer/session.h"

namespace upmoe {

// "going on after step 5", "its weights" or "random weights of seed 1".
std::string start_of(const RunConfig& run, const TrainState& state);
// "12 of 41 parameters (1,024 of 90,000 values): layers.*.moe.router_ED"; empty when everything trains.
std::string describe_frozen(const ParamStore& params);
// "layers.*.moe.router_ED x 2": what is trained in fp32 beside bf16, and what is not trained; empty: nothing.
std::string describe_fp32(const ParamStore& params);
std::string describe_buffers(const ParamStore& params);
// "249 sequences of 16 tokens in 1 file; steps 6 to 20 take 60 of them, 0.24 epochs".
std::string describe_data(const RunConfig& run, const std::vector<std::int64_t>& sequences_of_source,
                          std::int64_t first_step);
// Sources that the whole run repeats more often than pays, a sentence each.
std::vector<std::string> repeated_data(const RunConfig& run,
                                       const std::vector<std::int64_t>& sequences_of_source);
// `cores`: what the ranks compute on, in words; empty: not said.
void log_run_summary(const Session& session, const TrainState& state, std::span<const HeldOutData> valid,
                     const std::string& cores);

// Writes the resolved configuration as FOLDER/config.yaml. What changed at this start and at earlier ones
// stands above it as comments, because it is true only from that step on.
void write_run_config(const std::filesystem::path& run_dir, const RunConfig& run, std::int64_t first_step,
                      const std::vector<ConfigChange>& changes);

}  // namespace upmoe
