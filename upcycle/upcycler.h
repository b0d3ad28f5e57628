#pragma once
// Dense Hugging Face directory in, mixture of experts out, streaming: a Hugging Face directory or a checkpoint.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "configs/upcycle_config.h"
#include "data/folder.h"
#include "parallel/communicator.h"
#include "upcycle/recipe.h"
#include "upcycle/report.h"

namespace upmoe {

// The same values in both. A checkpoint is a shard store of one file per rank: training starts from it with
// every rank reading its part, and nothing has to be converted in between.
enum class OutputForm : std::uint8_t { kHuggingFace, kCheckpoint };
template <>
inline constexpr Names<OutputForm> kNames<OutputForm>{
    .built = {{OutputForm::kHuggingFace, "huggingface"}, {OutputForm::kCheckpoint, "checkpoint"}}};

struct UpcycleOptions {
  std::filesystem::path from, to;
  std::vector<std::filesystem::path> more_from = {};  // further dense models of the same shape
  OutputForm form = OutputForm::kHuggingFace;
  int threads = 0;                                   // computing, per rank; 0 = rank_threads()
  std::uint64_t max_shard_bytes = 4'000'000'000ull;  // of one safetensors file
  std::uint64_t piece_bytes = 8u << 20;              // computed and written in one go; whole disk blocks
  int error_tokens = 8;                              // random inputs for each layer's error in the report
  FreeSpace free_space = free_bytes_at;
  bool progress = true;
  // Nothing will be made: one `from` may be a config.json, whose weights need not be there.
  bool only_planned = false;
  // Of the Hugging Face form: asked by rank 0 for what the finished folder predicts, before it has its name; into the
  // report.
  std::function<StepZero(const std::filesystem::path& made)> check = {};
  // Of recipes that ask for tokens: asked by rank 0 before anything is made.
  std::function<Calibration()> calibrate = {};
};

// What would be done. Reads the source's headers only.
struct UpcyclePlan {
  std::string text;  // the recipe line by line and the files
  std::string json;  // the files, the recipe as resolved, and the mixture's config.json
};
UpcyclePlan plan_upcycle(const UpcycleConfig& config, const UpcycleOptions& options);

// Collective over `comm`: the ranks share the work by bytes. The values are the same for any number of ranks
// and threads, a Hugging Face directory to the byte; the output appears under its name when it is complete
// and on disk. Errors are agreed on: every rank throws.
void upcycle(const UpcycleConfig& config, const UpcycleOptions& options, Communicator& comm);

}  // namespace upmoe
