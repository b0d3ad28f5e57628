#include "trainer/generation_room.h"

#include <algorithm>
#include <numeric>

#include "kernels/core/gpu.h"

namespace upmoe {

namespace {

constexpr std::int64_t kRowsOfACpu = 64;  // a step reads each weight once for all of them: more gain little

}  // namespace

std::int64_t slots_of(const ModelConfig& config, std::span<const Prompt> prompts,
                      std::span<const std::size_t> which, const GenerationOptions& options) {
  std::int64_t longest = 1, chunk = 1;
  for (const std::size_t i : which) {
    longest = std::max(longest, prompts[i].length() + std::max<std::int64_t>(0, options.max_new_tokens - 1));
    chunk = std::max(chunk, std::min(options.chunk, prompts[i].length()));
  }
  const std::int64_t window = config.sliding_window;
  return window > 0 ? std::min(longest, window + chunk - 1) : longest;
}

std::int64_t rows_in(const RankModel& model, std::span<const Prompt> prompts,
                     const GenerationOptions& options, double device_bytes) {
  std::vector<std::size_t> all(prompts.size());
  std::iota(all.begin(), all.end(), 0);
  const Transformer& transformer = model.chunks.front();
  const auto keys = static_cast<double>(KeyCaches::bytes_of(transformer.attention_of_blocks(), 1,
                                                            slots_of(model.config, prompts, all, options),
                                                            transformer.dtype));
  const double logits = 2 * sizeof(float) * static_cast<double>(model.config.vocab_size),
               left = kMemoryOfRows * device_bytes - static_cast<double>(model.params.value_bytes());
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(left / (keys + logits)));
}

std::int64_t rows_that_fit(RankModel& model, std::span<const Prompt> prompts,
                           const GenerationOptions& options) {
  const Device device = model.memory.exec.device;
  if (device.type != DeviceType::kCuda) return kRowsOfACpu;
  std::int64_t rows = rows_in(model, prompts, options, static_cast<double>(gpu::memory_of(device.index)));
  if (model.mesh.world().size() > 1) model.mesh.world().all_reduce(host_view(&rows, {1}), ReduceOp::kMin);
  return rows;
}

}  // namespace upmoe
