#pragma once
// How much is kept of tokens, and how many rows there is room for.

#include "trainer/generation.h"
#include "trainer/generation_rates.h"

namespace upmoe {

// Slots of a cache that has room for the longest of `which` of the prompts, with its answer; with a window, for what it
// reaches over and the tokens that come at once.
std::int64_t slots_of(const ModelConfig& config, std::span<const Prompt> prompts,
                      std::span<const std::size_t> which, const GenerationOptions& options);

// How many rows a rank may have under way: on a CPU 64, on a GPU as rows_in() says of its memory, the fewest of any
// rank. Collective.
std::int64_t rows_that_fit(RankModel& model, std::span<const Prompt> prompts,
                           const GenerationOptions& options);

// What one rank keeps.
struct KeptBytes {
  double weights = 0;
  double row = 0;  // of one that is as long as the longest: its keys, values and logits
};
KeptBytes kept_by(const RankModel& model, std::span<const Prompt> prompts, const GenerationOptions& options);

// For how many such rows there is room in a share of so many bytes, beside the weights; 0: not for one. The rest of the
// memory is for activations and what libraries take.
constexpr double kMemoryOfRows = 0.8;
std::int64_t rows_beside(const KeptBytes& kept, double device_bytes);
// The same, but 1 at least.
std::int64_t rows_in(const RankModel& model, std::span<const Prompt> prompts,
                     const GenerationOptions& options, double device_bytes);

// A model that is to answer requests, beside others, and need not be there yet.
struct ModelToServe {
  std::string name;  // for people
  ModelConfig config;
  MeshSpec mesh;
};

// How many requests all ranks together may answer at once.
struct RequestRoom {
  std::int64_t requests = 0;
  bool more_fit = false;  // they are the most that are timed
};

// Rows of a rank that are timed at most, whatever memory there is: rates grow little beyond, and a round takes long.
std::int64_t most_rows_timed(Device device);

// Bytes that a rank may fill, as long as the job holds nothing yet: a GPU's own, or of a host what is left, evenly
// shared by its ranks; the least of any rank. Throws Error(kUsage) where a host does not say. Collective.
double bytes_for_a_rank(Communicator& world, Device device);

// Of each model, for the requests it is timed with, when every rank holds all of the models and fills a share
// (kMemoryOfRows) of `device_bytes`. Throws Error(kUsage) with the sizes where one has no room for a row. Collective.
std::vector<RequestRoom> room_for_requests(std::span<const ModelToServe> models, Communicator& world,
                                           const RankModel::Options& options, const RatesRequest& request,
                                           Device device, double device_bytes);

}  // namespace upmoe
