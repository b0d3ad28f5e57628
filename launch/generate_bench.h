#pragma once
// upmoe generate --bench: how fast models generate, and how far that is from what a machine could.

#include <string>
#include <vector>

#include "launch/compute_options.h"
#include "trainer/generation_rates.h"

namespace upmoe {

struct BenchArguments {
  std::vector<std::string> models;  // as shape_of_model() and weights_of_model() take them
  RatesRequest request;
  std::vector<std::int64_t> concurrency;  // of every model; empty: of each up to what there is room for
  double memory_gb = 0;                   // in, 10^9 bytes of a rank; 0: its device's own
  std::string machine;                    // empty: no best times
  int tp = 1;
  ComputeOptions compute;
  bool as_json = false;
};

// All the models are held at once, in memory of every rank. Collective.
int run_generate_bench(const BenchArguments& a, Runtime& runtime);

}  // namespace upmoe
