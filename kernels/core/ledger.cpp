#include "kernels/core/ledger.h"

#include <cmath>

namespace upmoe {

Cost& Cost::add(const Cost& o, double times) {
  calls += std::llround(times * static_cast<double>(o.calls));
  flops += times * o.flops;
  bytes_read += times * o.bytes_read;
  bytes_written += times * o.bytes_written;
  bytes_sent += times * o.bytes_sent;
  model_flops += times * o.model_flops;
  attention_flops += times * o.attention_flops;
  model_again += times * o.model_again;
  teacher_flops += times * o.teacher_flops;
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
                  .model_flops = is_of_model(work) ? flops : 0,
                  .attention_flops = is_attention(work) ? flops : 0};
  if (listener_) listener_({op, work, cost});
  entry(entries_, op) += cost;
}

void Ledger::again(std::string_view op, double flops, double bytes_read, double bytes_written, Work work) {
  if (listener_)
    listener_({op,
               work,
               {.calls = 1, .flops = flops, .bytes_read = bytes_read, .bytes_written = bytes_written},
               Books::kAgain});
  if (is_of_model(work)) entry(entries_, op).model_again += flops;
}

void Ledger::of_teacher(std::string_view op, double flops, double bytes_read, double bytes_written,
                        Work work) {
  if (listener_)
    listener_({op,
               work,
               {.calls = 1, .flops = flops, .bytes_read = bytes_read, .bytes_written = bytes_written},
               Books::kTeacher});
  if (is_of_model(work)) entry(entries_, op).teacher_flops += flops;
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
