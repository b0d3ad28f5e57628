#include "configs/machine.h"

#include <fmt/format.h>

#include <array>
#include <utility>

#include "configs/schema.h"

namespace upmoe {

namespace {

const NumberCheck kPositive{.least = 0, .above = true};

void add_rates(Schema& schema, Machine::Rates& r) {
  schema.section("rates")
      .key("source", r.source)
      .says("Where the rates come from.")
      .key("edges", r.edges, kPositive)
      .says("Edges of cubic products, rising, at which the lists below are given.")
      .key("gemm_bf16", r.gemm_bf16, kPositive)
      .says("Dense products, 10^12 FLOP/s, one for each edge.")
      .key("gemm_fp32", r.gemm_fp32, kPositive)
      .key("grouped_bf16", r.grouped_bf16, kPositive)
      .says("Products of routed experts, by the edge of one expert's.")
      .key("grouped_fp32", r.grouped_fp32, kPositive)
      .key("attention_forward_bf16", r.attention_forward_bf16, kPositive)
      .says("Causal attention, 10^12 FLOP/s of what it must compute.")
      .key("attention_backward_bf16", r.attention_backward_bf16, kPositive)
      .key("attention_forward_fp32", r.attention_forward_fp32, kPositive)
      .key("attention_backward_fp32", r.attention_backward_fp32, kPositive)
      .key("copy_gb_per_s", r.copy_gb_per_s, kPositive)
      .says("10^9 bytes/s read and written by ops that are bound by memory.")
      .key("op_us", r.op_us, {.least = 0})
      .says("Microseconds of each call besides.")
      .key("skew", r.skew, {.least = 0})
      .says("What ranks wait for the last of them, as a share of computing.");
}

void add_link(Schema& schema, const std::string& section, Machine::Link& link) {
  schema.section(section)
      .key("gb_per_s", link.gb_per_s, kPositive)
      .says("10^9 bytes/s that one rank sends while all do.")
      .key("latency_us", link.latency_us, {.least = 0})
      .says("Microseconds of a message.")
      .key("overlap", link.overlap, {.least = 0, .most = 1})
      .says("Share of the computation beside which transfers go on.");
}

Schema schema_of(Machine& m) {
  const NumberCheck positive{.least = 0, .above = true, .required = true};
  Schema schema;
  schema.section("")
      .key("name", m.name, TextCheck{.required = true})
      .key("source", m.source, TextCheck{.required = true})
      .key("bf16_tflops", m.bf16_tflops, positive)
      .key("memory_gb", m.memory_gb, positive)
      .key("memory_gb_per_s", m.memory_gb_per_s, positive)
      .key("fp32_tflops", m.fp32_tflops, kPositive)
      .key("ranks_per_node", m.ranks_per_node, {.least = 1})
      .key("shared_by_ranks", m.shared_by_ranks)
      .key("usable_gb", m.usable_gb, kPositive)
      .key("overhead_gb", m.overhead_gb, {.least = 0});
  add_rates(schema, m.rates);
  add_link(schema, "inside_node", m.inside_node);
  add_link(schema, "between_nodes", m.between_nodes);
  schema.section("disk").key("gb_per_s", m.disk_gb_per_s, kPositive).says("10^9 bytes/s of all ranks.");
  return schema;
}

void check_lists(const Machine::Rates& r, const Schema& schema, Problems& problems) {
  for (std::size_t i = 1; i < r.edges.size(); ++i)
    if (r.edges[i] <= r.edges[i - 1])
      problems.add(schema.place_of("rates.edges"),
                   fmt::format("{} after {}, expected rising edges", r.edges[i], r.edges[i - 1]));
  const std::array lists{
      std::pair{"rates.gemm_bf16", &r.gemm_bf16}, std::pair{"rates.gemm_fp32", &r.gemm_fp32},
      std::pair{"rates.grouped_bf16", &r.grouped_bf16}, std::pair{"rates.grouped_fp32", &r.grouped_fp32}};
  for (const auto& [key, list] : lists)
    if (!list->empty() && list->size() != r.edges.size())
      problems.add(schema.place_of(key), fmt::format("{} rates for {} of rates.edges, expected one for each",
                                                     list->size(), r.edges.size()));
}

// Numbers that were never said are left out: their key would be refused.
bool is_said(const std::string& value) {
  return value != "0" && value != "[]" && value != "''" && value != "\"\"";
}

}  // namespace

Machine read_machine(const std::filesystem::path& file) {
  Machine machine;
  Schema schema = schema_of(machine);
  Problems problems;
  const YamlNode root = parse_yaml(read_text_file(file), file.string(), problems);
  schema.read(root, problems);
  schema.check_required(file.string(), problems);
  check_lists(machine.rates, schema, problems);
  problems.throw_if_any(ExitCode::kUsage, file.string());
  return machine;
}

std::string to_yaml(const Machine& machine) {
  Machine copy = machine;
  std::string out, section;
  for (const auto& [key, value] : schema_of(copy).values()) {
    if (!is_said(value)) continue;
    const std::size_t dot = key.find('.');
    const std::string of = dot == std::string::npos ? "" : key.substr(0, dot);
    if (of != section) out += of + ":\n";
    section = of;
    out += fmt::format("{}{}: {}\n", of.empty() ? "" : "  ",
                       dot == std::string::npos ? key : key.substr(dot + 1), value);
  }
  return out;
}

}  // namespace upmoe
