#include "kernels/core/ledger.h"

namespace upmoe {

Cost& Cost::operator+=(const Cost& o) {
  calls += o.calls;
  flops += o.flops;
  bytes_read += o.bytes_read;
  bytes_written += o.bytes_written;
  bytes_sent += o.bytes_sent;
  model_flops += o.model_flops;
  return *this;
}

namespace {
Cost& entry(std::map<std::string, Cost, std::less<>>& entries, std::string_view name) {
  auto it = entries.find(name);
  return it != entries.end() ? it->second : entries.emplace(std::string(name), Cost{}).first->second;
}
}  // namespace

void Ledger::book(std::string_view op, double flops, double bytes_read, double bytes_written, Work work) {
  if (listener_) listener_(op);
  entry(entries_, op) += Cost{1, flops, bytes_read, bytes_written, 0, work == Work::kModel ? flops : 0};
}

void Ledger::again(std::string_view op) const {
  if (listener_) listener_(std::string(op) + " again");
}

void Ledger::book_sent(std::string_view verb, double bytes) {
  entry(entries_, verb) += Cost{1, 0, 0, 0, bytes, 0};
}

Cost Ledger::total() const {
  Cost sum;
  for (const auto& [name, cost] : entries_) sum += cost;
  return sum;
}

}  // namespace upmoe
