#include "data/batch_loader.h"

#include <algorithm>
#include <array>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stop_token>
#include <thread>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

Deal deal_of(const BatchLoader::Options& options) {
  return {options.global_batch / options.micro_batch, options.dp_rank, options.dp_size};
}

// One micro-batch's memory. Positions without documents are the same for every batch and filled once.
struct Slot {
  std::vector<std::int32_t> tokens, targets, positions, documents;
  std::int64_t index = -1;
  std::int64_t step_targets = 0;  // of the first one of a step: how many targets of all of them count
};

}  // namespace

// A ring of three slots: one in the caller's hands, two read ahead. `made` and `taken` count micro-batches of
// this rank since the start; batch n lies in slot n mod 3.
struct BatchLoader::Impl {
  Impl(const TokenDataset& dataset, const Options& o, std::int64_t first)
      : data(dataset), options(o), deal(deal_of(o)), first_sample(first) {
    const auto rows = static_cast<std::size_t>(options.micro_batch * data.seq_len());
    for (Slot& slot : slots) {
      slot.tokens.resize(rows);
      slot.targets.resize(rows);
      slot.positions.resize(rows);
      if (options.mask_documents) slot.documents.resize(rows);
      const auto length = static_cast<std::size_t>(data.seq_len());
      for (std::size_t i = 0; i < rows; ++i) slot.positions[i] = static_cast<std::int32_t>(i % length);
    }
    thread = std::jthread([this](const std::stop_token& stop) { run(stop); });
  }

  void run(const std::stop_token& stop) {
    try {
      while (true) {
        std::int64_t turn = 0;
        {
          std::unique_lock lock(mutex);
          // False: asked to stop, by the jthread's destructor.
          if (!changed.wait(lock, stop, [&] { return made - taken < kAhead; })) return;
          turn = made;
        }
        // Without the lock: until `made` says so, nobody else looks at this slot.
        fill(turn, slots[static_cast<std::size_t>(turn % kSlots)]);
        const std::scoped_lock lock(mutex);
        ++made;
        changed.notify_all();
      }
    } catch (...) {
      const std::scoped_lock lock(mutex);
      error = std::current_exception();
      changed.notify_all();
    }
  }

  std::int64_t first_sample_of(std::int64_t step, std::int64_t index) const {
    return first_sample + step * options.global_batch + index * options.micro_batch;
  }

  // Of a whole step, before its first micro-batch: gradients are divided by it as they come.
  std::int64_t count_targets(std::int64_t step) const {
    std::int64_t sum = 0;
    for (std::int64_t round = 0; round < deal.rounds(); ++round) {
      const std::int64_t index = deal.index(round);
      for (std::int64_t i = 0; index >= 0 && i < options.micro_batch; ++i)
        sum += data.counted_targets(first_sample_of(step, index) + i);
    }
    return sum;
  }

  void fill(std::int64_t turn, Slot& slot) const {
    const std::int64_t rounds = deal.rounds(), step = turn / rounds;
    if (turn % rounds == 0 && data.masks_targets()) slot.step_targets = count_targets(step);
    slot.index = deal.index(turn % rounds);
    if (slot.index < 0) return;
    const std::int64_t sample = first_sample_of(step, slot.index);
    const auto length = static_cast<std::size_t>(data.seq_len());
    for (std::int64_t i = 0; i < options.micro_batch; ++i) {
      const std::size_t at = static_cast<std::size_t>(i) * length;
      const auto part = [&](std::vector<std::int32_t>& all) { return std::span(all).subspan(at, length); };
      if (options.mask_documents) {
        data.read(sample + i, part(slot.tokens), part(slot.targets), part(slot.documents),
                  part(slot.positions));
      } else {
        data.read(sample + i, part(slot.tokens), part(slot.targets), {}, {});
      }
    }
  }

  // Hands back the slot given out before, then waits for the next one.
  const Slot& take() {
    std::unique_lock lock(mutex);
    if (handed_out) {
      ++taken;
      handed_out = false;
      changed.notify_all();
    }
    changed.wait(lock, [&] { return made > taken || error != nullptr; });
    if (made <= taken) std::rethrow_exception(error);  // batches made before the error are still good
    handed_out = true;
    return slots[static_cast<std::size_t>(taken % kSlots)];
  }

  std::int64_t targets_of_next_step() {
    UPMOE_CHECK(turns % deal.rounds() == 0, "micro-batch {} of {} is not the first of a step", turns,
                deal.rounds());
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return made > turns || error != nullptr; });
    if (made <= turns) std::rethrow_exception(error);
    return slots[static_cast<std::size_t>(turns % kSlots)].step_targets;
  }

  static constexpr std::int64_t kSlots = 3,
                                kAhead = 3;  // the one in the caller's hands counts as not taken yet
  const TokenDataset& data;
  const Options options;
  const Deal deal;
  const std::int64_t first_sample;
  std::array<Slot, kSlots> slots;
  std::mutex mutex;
  std::condition_variable_any changed;
  std::int64_t made = 0, taken = 0;
  bool handed_out = false;
  std::exception_ptr error;
  std::int64_t turns = 0;  // micro-batches handed out; of the caller's thread alone
  std::jthread thread;     // last: stopped and joined before what it uses goes
};

BatchLoader::BatchLoader(const TokenDataset& data, Options options, std::int64_t first_sample) {
  const std::int64_t global = options.global_batch, micro = options.micro_batch;
  UPMOE_CHECK(micro > 0 && global > 0 && global % micro == 0, "global batch {}, micro-batch {}", global,
              micro);
  UPMOE_CHECK(options.dp_size > 0 && options.dp_rank >= 0 && options.dp_rank < options.dp_size,
              "rank {} of {}", options.dp_rank, options.dp_size);
  UPMOE_CHECK(first_sample >= 0 && first_sample % global == 0, "sample {} is not the first of a step of {}",
              first_sample, global);
  impl_ = std::make_unique<Impl>(data, options, first_sample);
}

BatchLoader::~BatchLoader() = default;

std::int64_t BatchLoader::rounds() const {
  return impl_->deal.rounds();
}

Batch BatchLoader::next() {
  const Slot& slot = impl_->take();
  ++impl_->turns;
  const auto rows = slot.index < 0 ? 0 : static_cast<std::int64_t>(slot.tokens.size());
  const auto view = [&](const std::vector<std::int32_t>& all) { return host_view(all.data(), Shape{rows}); };
  Batch batch;
  batch.tokens_T = view(slot.tokens);
  batch.targets_T = view(slot.targets);
  batch.positions_T = view(slot.positions);
  if (impl_->options.mask_documents) batch.document_T = view(slot.documents);
  batch.seq_len = impl_->data.seq_len();
  batch.index = slot.index;
  return batch;
}

std::optional<std::int64_t> BatchLoader::counted_targets() {
  if (!impl_->data.masks_targets()) return {};
  return impl_->targets_of_next_step();
}

std::int64_t BatchLoader::position() const {
  const std::int64_t steps = impl_->turns / rounds(), round = impl_->turns % rounds();
  const Options& o = impl_->options;
  const std::int64_t in_step = std::min(round * o.dp_size * o.micro_batch, o.global_batch);
  return impl_->first_sample + steps * o.global_batch + in_step;
}

}  // namespace upmoe
