#include "upcycle/write_pipeline.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "upcycle/workers.h"

namespace upmoe {
namespace {

struct Piece {
  std::size_t index = 0;
  std::vector<std::byte> bytes;
};

// Empty buffers one way, filled ones the other.
class Exchange {
 public:
  Exchange(std::size_t buffers, std::size_t pieces) : empty_(buffers), pieces_(pieces) {}

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
    empty_.push_back(std::move(piece.bytes));
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
  std::vector<std::vector<std::byte>> empty_;
  std::deque<Piece> filled_;
  std::size_t pieces_, taken_ = 0, written_ = 0;
  bool over_ = false, has_writer_ = false;
};

}  // namespace

void run_pipeline(std::size_t count, int threads, const PipelineStages& stages) {
  Exchange exchange(static_cast<std::size_t>(threads) + 3, count);
  run_workers(threads + 1, [&](const std::atomic<bool>&) {
    try {
      if (exchange.become_writer()) {
        while (std::optional<Piece> piece = exchange.take_filled()) {
          if (!piece->bytes.empty()) stages.write(piece->index, piece->bytes);
          exchange.put_empty(std::move(*piece));
        }
      } else {
        while (std::optional<Piece> piece = exchange.take_empty()) {
          stages.make(piece->index, piece->bytes);
          exchange.put_filled(std::move(*piece));
        }
      }
    } catch (...) {
      exchange.end();
      throw;
    }
  });
}

}  // namespace upmoe
