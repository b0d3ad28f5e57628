#include "trainer/generation_room.h"

#include <algorithm>
#include <numeric>

#include "kernels/core/gpu.h"
#include "parallel/dry_comm.h"
#include "parallel/host.h"
#include "trainer/memory_estimate.h"

namespace upmoe {

namespace {

constexpr std::int64_t kRowsOfACpu = 64;  // a step reads each weight once for all of them: more gain little
constexpr std::int64_t kTimedOnAGpu = 256;

KeptBytes rehearsed(const ModelToServe& m, Communicator& world, const RankModel::Options& options,
                    const RatesRequest& request) {
  const auto nobody = make_dry_communicator(world.rank(), world.size());
  const RankModel model(m.config, m.mesh, *nobody, {DeviceType::kDry, 0}, options);
  const Prompt one{std::vector<std::int32_t>(static_cast<std::size_t>(request.prompt)), 0};
  return kept_by(model, {&one, 1}, {.max_new_tokens = request.output});
}

[[noreturn]] void refuse_a_row(const ModelToServe& m, const KeptBytes& kept, std::size_t models,
                               const RatesRequest& request, double device_bytes) {
  fail(ExitCode::kUsage,
       "{}: no memory for one request of {} tokens in and {} out: its keys, values and logits take {:.4g} GB "
       "of a rank, the weights of {} {:.4g} GB, and there are {:.4g} GB ({:.0f} % of {:.4g}); ask for fewer "
       "tokens or --precision bf16, time one model at a time, or share layers with --tp",
       m.name, request.prompt, request.output, kept.row * 1e-9,
       models == 1 ? "the model" : fmt::format("all {} models", models), kept.weights * 1e-9,
       kMemoryOfRows * device_bytes * 1e-9, 100 * kMemoryOfRows, device_bytes * 1e-9);
}

std::int64_t least_of_all(Communicator& world, std::int64_t mine) {
  if (world.size() > 1) world.all_reduce(host_view(&mine, {1}), ReduceOp::kMin);
  return mine;
}

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

KeptBytes kept_by(const RankModel& model, std::span<const Prompt> prompts, const GenerationOptions& options) {
  std::vector<std::size_t> all(prompts.size());
  std::iota(all.begin(), all.end(), 0);
  const Transformer& transformer = model.chunks.front();
  const auto keys = static_cast<double>(KeyCaches::bytes_of(transformer.attention_of_blocks(), 1,
                                                            slots_of(model.config, prompts, all, options),
                                                            transformer.dtype));
  const double logits = 2 * sizeof(float) * static_cast<double>(model.config.vocab_size);
  return {.weights = static_cast<double>(model.params.value_bytes()), .row = keys + logits};
}

std::int64_t rows_beside(const KeptBytes& kept, double device_bytes) {
  const double left = kMemoryOfRows * device_bytes - kept.weights;
  return std::max<std::int64_t>(0, static_cast<std::int64_t>(left / kept.row));
}

std::int64_t rows_in(const RankModel& model, std::span<const Prompt> prompts,
                     const GenerationOptions& options, double device_bytes) {
  return std::max<std::int64_t>(1, rows_beside(kept_by(model, prompts, options), device_bytes));
}

std::int64_t rows_that_fit(RankModel& model, std::span<const Prompt> prompts,
                           const GenerationOptions& options) {
  const Device device = model.memory.exec.device;
  if (device.type != DeviceType::kCuda) return kRowsOfACpu;
  return least_of_all(model.mesh.world(),
                      rows_in(model, prompts, options, static_cast<double>(gpu::memory_of(device.index))));
}

std::int64_t most_rows_timed(Device device) {
  return device.type == DeviceType::kCuda ? kTimedOnAGpu : kRowsOfACpu;
}

double bytes_for_a_rank(Communicator& world, Device device) {
  std::int64_t bytes = 0;
  if (device.type == DeviceType::kCuda) {
    bytes = static_cast<std::int64_t>(gpu::memory_of(device.index));
  } else {
    const HostPlace place = place_among(hosts_of(world), world.rank());
    bytes = static_cast<std::int64_t>(memory_left() / place.ranks_here);
  }
  bytes = least_of_all(world, bytes);
  run_agreed(world, [&] {
    if (bytes <= 0)
      fail(ExitCode::kUsage,
           "the memory that is left here is not known; say it as --memory GB, or how many requests at once "
           "as --concurrency 1,4,16");
  });
  return static_cast<double>(bytes);
}

std::vector<RequestRoom> room_for_requests(std::span<const ModelToServe> models, Communicator& world,
                                           const RankModel::Options& options, const RatesRequest& request,
                                           Device device, double device_bytes) {
  std::vector<KeptBytes> kept;
  run_agreed(world, [&] {
    for (const ModelToServe& m : models) kept.push_back(rehearsed(m, world, options, request));
  });
  double weights = 0;
  for (const KeptBytes& k : kept) weights += k.weights;
  std::vector<RequestRoom> rooms;
  for (std::size_t m = 0; m < models.size(); ++m) {
    const KeptBytes beside{weights, kept[m].row};
    const std::int64_t fit = least_of_all(world, rows_beside(beside, device_bytes)),
                       most = most_rows_timed(device);
    run_agreed(world, [&] {
      if (fit == 0) refuse_a_row(models[m], beside, models.size(), request, device_bytes);
    });
    rooms.push_back({std::min(fit, most) * models[m].mesh.dp, fit > most});
  }
  return rooms;
}

}  // namespace upmoe
