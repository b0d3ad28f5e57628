#include "kernels/core/ledger.h"

namespace upmoe {

Cost& Cost::operator+=(const Cost& o) {
  calls += o.calls;
  flops += o.flops;
  bytes_read += o.bytes_read;
  bytes_written += o.bytes_written;
  bytes_sent += o.bytes_sent;
  model_flops += o.model_flops;
  model_again += o.model_again;
  teacher_flops += o.teacher_flops;
  return *this;
}

namespace {
Cost& entry(std::map<std::string, Cost, std::less<>>& entries, std::string_view name) {
  auto it = entries.find(name);
  return it != entries.end() ? it->second : entries.emplace(std::string(name), Cost{}).first->second;
}
}  // namespace

void Ledger::book(std::string_view op, double flops, double bytes_read, double bytes_written, Work work) {
  const Cost cost{.calls = 1,
                  .flops = flops,
                  .bytes_read = bytes_read,
                  .bytes_written = bytes_written,
                  .model_flops = work == Work::kModel ? flops : 0};
  if (listener_) listener_({op, cost});
  entry(entries_, op) += cost;
}

void Ledger::again(std::string_view op, double flops, double bytes_read, double bytes_written, Work work) {
  if (listener_)
    listener_({op,
               {.calls = 1, .flops = flops, .bytes_read = bytes_read, .bytes_written = bytes_written},
               Books::kAgain});
  if (work == Work::kModel) entry(entries_, op).model_again += flops;
}

void Ledger::of_teacher(std::string_view op, double flops, double bytes_read, double bytes_written,
                        Work work) {
  if (listener_)
    listener_({op,
               {.calls = 1, .flops = flops, .bytes_read = bytes_read, .bytes_written = bytes_written},
               Books::kTeacher});
  if (work == Work::kModel) entry(entries_, op).teacher_flops += flops;
}

void Ledger::book_sent(std::string_view verb, double bytes) {
  entry(entries_, verb) += Cost{.calls = 1, .bytes_sent = bytes};
}

Cost Ledger::total() const {
  Cost sum;
  for (const auto& [name, cost] : entries_) sum += cost;
  return sum;
}

}  // namespace upmoe
