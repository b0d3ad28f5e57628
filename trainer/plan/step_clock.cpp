#include "trainer/plan/step_clock.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace upmoe {

double StepTime::seconds() const {
  double sum = compute;
  for (const auto& [verb, seconds] : waited) sum += seconds;
  return sum;
}

void StepTime::add(const StepTime& o, double factor) {
  compute += factor * o.compute;
  calls += factor * o.calls;
  for (const auto& [op, seconds] : o.by_op) by_op[op] += factor * seconds;
  for (const auto& [verb, seconds] : o.waited) waited[verb] += factor * seconds;
  for (const auto& [verb, bytes] : o.sent) {
    SentBytes& mine = sent[verb];
    mine.inside += factor * bytes.inside;
    mine.between += factor * bytes.between;
    mine.transfers += factor * bytes.transfers;
  }
}

void StepClock::op(const ToldOp& told) {
  if (speed_ == nullptr) return;
  const double seconds = speed_->op_seconds(told.work, told.cost);
  time_.compute += seconds;
  time_.calls += speed_->call_seconds();
  time_.by_op[std::string(told.name)] += seconds;
  alone_ += seconds;
  // What is under way gets on meanwhile, the first one first.
  double at = now_;
  now_ += seconds;
  while (!wire_.empty()) {
    UnderWay& first = *wire_.front();
    at = std::max(at, first.from);
    if (at >= now_) return;
    if ((now_ - at) * first.overlap < first.left) {
      first.left -= (now_ - at) * first.overlap;
      first.from = now_;
      return;
    }
    if (first.left > 0) at += first.left / first.overlap;
    first.left = 0;
    wire_.pop_front();
  }
}

SentBytes StepClock::bytes_of(const DryTransfer& t) const {
  const int node = t.members[static_cast<std::size_t>(t.me)] / ranks_per_node_;
  const auto at = [&](int rank) {
    return std::lower_bound(t.members.begin(), t.members.end(), rank) - t.members.begin();
  };
  const auto begin = at(node * ranks_per_node_), end = at((node + 1) * ranks_per_node_);
  SentBytes bytes{.transfers = 1};
  if (t.rows.empty()) {
    const auto here = static_cast<double>(end - begin), all = static_cast<double>(t.members.size());
    bytes.inside = t.each * (here - 1);
    bytes.between = t.each * (all - here);
    return bytes;
  }
  for (std::size_t i = 0; i < t.rows.size(); ++i) {
    if (static_cast<int>(i) == t.me) continue;
    const auto place = static_cast<std::ptrdiff_t>(i);
    (begin <= place && place < end ? bytes.inside : bytes.between) +=
        static_cast<double>(t.rows[i]) * t.row_bytes;
  }
  return bytes;
}

StepClock::UnderWay StepClock::time_of(const DryTransfer& t, const SentBytes& bytes) const {
  const Machine::Link& inside = speed_->inside_node();
  const Machine::Link& between = speed_->between_nodes();
  const bool leaves = t.members.front() / ranks_per_node_ != t.members.back() / ranks_per_node_;
  const Machine::Link& slowest = leaves ? between : inside;
  // Both links work at the same time; ranks are reached as a tree reaches them.
  const double seconds = std::max(bytes.inside > 0 ? bytes.inside / (inside.gb_per_s * 1e9) : 0,
                                  bytes.between > 0 ? bytes.between / (between.gb_per_s * 1e9) : 0);
  const double messages = std::ceil(std::log2(static_cast<double>(t.members.size())));
  return {.from = now_ + speed_->skew() * alone_,
          .left = seconds + messages * slowest.latency_us * 1e-6,
          .overlap = slowest.overlap};
}

std::function<void()> StepClock::begin(const DryTransfer& t) {
  if (t.members.size() < 2) return {};
  const SentBytes bytes = bytes_of(t);
  SentBytes& sum = time_.sent[std::string(t.verb)];
  sum.inside += bytes.inside;
  sum.between += bytes.between;
  sum.transfers += 1;
  if (speed_ == nullptr || t.verb == "send") return {};  // nobody waits for what was sent to a stage
  auto under_way = std::make_shared<UnderWay>(time_of(t, bytes));
  wire_.push_back(under_way);
  return [this, under_way, verb = std::string(t.verb)] {
    if (under_way->left <= 0) return;
    const double waited = std::max(0.0, under_way->from - now_) + under_way->left;
    time_.waited[verb] += waited;
    now_ += waited;
    alone_ = 0;
    under_way->left = 0;
    std::erase(wire_, under_way);
  };
}

StepTime StepClock::take() {
  return std::exchange(time_, {});
}

}  // namespace upmoe
