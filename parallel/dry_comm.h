#pragma once
// Rank r of a world that does not exist: the verbs check and book what a real transport would send, and nothing moves.

#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "parallel/communicator.h"

namespace upmoe {

// What a verb would move from this rank to others, seen by who measures a rehearsal.
struct DryTransfer {
  std::string_view verb;
  std::span<const int> members = {};        // of the group, as ranks of the world, rising
  int me = 0;                               // which of them
  double each = 0;                          // bytes to every other member; or else
  std::span<const std::int64_t> rows = {};  // so many of them to each,
  double row_bytes = 0;                     // of so many bytes
};

class DryWire {
 public:
  virtual ~DryWire() = default;
  // It sets out. What is returned is called, at most once, when the rank waits for its end. The spans hold for this
  // call alone.
  virtual std::function<void()> begin(const DryTransfer& transfer) = 0;
};

// Outputs stay as they are. `wire`, where given, is shown every transfer of the world and of its groups, and outlives
// them.
std::unique_ptr<Communicator> make_dry_communicator(int rank, int size, DryWire* wire = nullptr);

}  // namespace upmoe
