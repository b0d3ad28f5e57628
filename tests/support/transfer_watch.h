#pragma once
// The order of ops and transfers: what a transfer reads may not be written while it is under way, what it
// writes may not be touched. On the CPU a mistake of this kind often goes unnoticed, because a transfer
// between threads may have happened already; on a GPU it is a race.

#include <fmt/format.h>

#include <list>
#include <string>
#include <vector>

#include "kernels/core/exec.h"

namespace upmoe::test {

class TransferWatch final : public OpWatcher {
 public:
  struct Transfer {
    std::string verb;
    ConstTensorView in;
    TensorView out;
  };

  void reads(const ConstTensorView& t) override { check(t, false, "an op"); }
  void writes(const TensorView& t) override { check(t, true, "an op"); }
  // Reads and writes like an op, and goes on.
  std::function<void()> transfers(std::string_view verb, const ConstTensorView& in,
                                  const TensorView& out) override {
    check(in, false, std::string(verb));
    check(out, true, std::string(verb));
    ++begun_;
    most_ = std::max(most_, under_way_.size() + 1);
    return [this, at = under_way_.insert(under_way_.end(), {std::string(verb), in, out})] {
      under_way_.erase(at);
    };
  }

  const std::vector<std::string>& mistakes() const { return mistakes_; }
  std::size_t begun() const { return begun_; }
  std::size_t most_under_way() const { return most_; }

 private:
  static bool overlap(const ConstTensorView& a, const ConstTensorView& b) {
    return a.data != nullptr && b.data != nullptr && a.data < b.data + b.bytes() &&
           b.data < a.data + a.bytes();
  }
  void check(const ConstTensorView& t, bool writes, const std::string& who) {
    for (const Transfer& u : under_way_) {
      const bool of_out = overlap(t, u.out), of_in = writes && overlap(t, u.in);
      if (of_out || of_in)
        mistakes_.push_back(fmt::format("{} {} {} {}, which a {} that is under way {}", who,
                                        writes ? "writes" : "reads", name_of(t.dtype), t.shape.str(), u.verb,
                                        of_out ? "writes" : "reads"));
    }
  }
  std::list<Transfer> under_way_;
  std::vector<std::string> mistakes_;
  std::size_t begun_ = 0, most_ = 0;
};

}  // namespace upmoe::test
