#pragma once
// The time of one rank's step in a rehearsal: ops pass one after the other, transfers go on beside them as far as the
// machine's links allow, and the rank stands still where it waits for one. So what overlaps is what the program's own
// order lets overlap. A transfer begins when the last rank has come to it, which is later than a rank in the mean by a
// share (Machine::Rates::skew) of what was computed since ranks last waited for each other.

#include <deque>
#include <map>
#include <memory>
#include <string>

#include "parallel/dry_comm.h"
#include "trainer/plan/rank_speed.h"

namespace upmoe {

// Bytes that leave a rank, by where they go.
struct SentBytes {
  double inside = 0, between = 0;  // of its node, and to others
  double transfers = 0;
};

// Of one step, or, as a difference, of the micro-batches between two.
struct StepTime {
  double compute = 0;                              // seconds
  double calls = 0;                                // of them, what calls take besides their work
  std::map<std::string, double> by_op;             // of them, with what is done again and a teacher's
  std::map<std::string, double> waited;            // seconds, by verb
  std::map<std::string, SentBytes> sent;           // by verb
  double seconds() const;                          // compute and all waits
  void add(const StepTime& other, double factor);  // += factor * other
};

class StepClock final : public DryWire {
 public:
  // The rank's place among nodes is that of its number: neighbours share one. Without `speed` bytes are counted and
  // nothing takes time. `speed` outlives this.
  StepClock(const RankSpeed* speed, int ranks_per_node) : speed_(speed), ranks_per_node_(ranks_per_node) {}

  void op(const ToldOp& told);
  std::function<void()> begin(const DryTransfer& transfer) override;
  // What passed since the last call.
  StepTime take();

 private:
  struct UnderWay {
    double from = 0;     // when the last of the others has come to it too
    double left = 0;     // seconds
    double overlap = 0;  // of its link
  };
  SentBytes bytes_of(const DryTransfer& transfer) const;
  UnderWay time_of(const DryTransfer& transfer, const SentBytes& bytes) const;

  const RankSpeed* speed_;
  int ranks_per_node_;
  StepTime time_;
  double now_ = 0;                              // seconds, over all steps
  double alone_ = 0;                            // of computing since this rank last waited for others
  std::deque<std::shared_ptr<UnderWay>> wire_;  // one after the other
};

}  // namespace upmoe
