#include "upcycle/write_pipeline.h"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "data/direct_file.h"
#include "kernels/core/check.h"
#include "parallel/watchdog.h"
#include "upcycle/workers.h"

namespace upmoe {
namespace {

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<std::byte, Free>;

Buffer allocate(std::size_t bytes) {
  const std::size_t whole_blocks = (bytes + kDiskBlock - 1) / kDiskBlock * kDiskBlock;
  Buffer buffer(static_cast<std::byte*>(std::aligned_alloc(kDiskBlock, std::max(whole_blocks, kDiskBlock))));
  if (buffer == nullptr) throw std::bad_alloc();
  return buffer;
}

struct Piece {
  std::size_t index = 0;
  Buffer buffer;
  std::size_t bytes = 0;
};

//           empty_ <----------------- put_empty ------------------ the writer
//             |  take_empty                                        ^  take_filled
//             v                                                    |
//           makers (threads of them) --- put_filled --> filled_ ---+
//
// Every piece is made and written once; pieces may be written in another order than they are numbered, as each knows
// its place. With three buffers more than makers one can be written and the next wait while all makers are busy.
// Empty buffers one way, filled ones the other.
class Exchange {
 public:
  Exchange(std::size_t buffers, std::size_t buffer_bytes, std::size_t pieces) : pieces_(pieces) {
    for (std::size_t i = 0; i < buffers; ++i) empty_.push_back(allocate(buffer_bytes));
  }

  // The next piece to make and a buffer for it; nothing when all are taken or the run is over.
  std::optional<Piece> take_empty() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return over_ || taken_ == pieces_ || !empty_.empty(); });
    if (over_ || taken_ == pieces_) return std::nullopt;
    Piece piece{taken_++, std::move(empty_.back())};
    empty_.pop_back();
    return piece;
  }

  void put_filled(Piece piece) {
    const std::lock_guard lock(mutex_);
    filled_.push_back(std::move(piece));
    changed_.notify_all();
  }

  std::optional<Piece> take_filled() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return over_ || !filled_.empty() || written_ == pieces_; });
    if (over_ || filled_.empty()) return std::nullopt;
    Piece piece = std::move(filled_.front());
    filled_.pop_front();
    return piece;
  }

  void put_empty(Piece piece) {
    const std::lock_guard lock(mutex_);
    ++written_;
    empty_.push_back(std::move(piece.buffer));
    changed_.notify_all();
  }

  void end() {
    const std::lock_guard lock(mutex_);
    over_ = true;
    changed_.notify_all();
  }

  bool become_writer() {
    const std::lock_guard lock(mutex_);
    return !std::exchange(has_writer_, true);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Buffer> empty_;
  std::deque<Piece> filled_;
  std::size_t pieces_, taken_ = 0, written_ = 0;
  bool over_ = false, has_writer_ = false;
};

}  // namespace

void run_pipeline(std::size_t count, int threads, std::size_t buffer_bytes, const PipelineStages& stages) {
  Exchange exchange(static_cast<std::size_t>(threads) + 3, buffer_bytes, count);
  run_workers(threads + 1, [&](const std::atomic<bool>&) {
    try {
      if (exchange.become_writer()) {
        while (std::optional<Piece> piece = exchange.take_filled()) {
          if (piece->bytes > 0) stages.write(piece->index, {piece->buffer.get(), piece->bytes});
          exchange.put_empty(std::move(*piece));
          watchdog::heartbeat();
        }
      } else {
        while (std::optional<Piece> piece = exchange.take_empty()) {
          piece->bytes = stages.make(piece->index, {piece->buffer.get(), buffer_bytes});
          UPMOE_CHECK(piece->bytes <= buffer_bytes, "{} bytes into a buffer of {}", piece->bytes,
                      buffer_bytes);
          exchange.put_filled(std::move(*piece));
          watchdog::heartbeat();
        }
      }
    } catch (...) {
      // The others stop at their next exchange instead of waiting for a piece that never comes.
      exchange.end();
      throw;
    }
  });
}

}  // namespace upmoe
