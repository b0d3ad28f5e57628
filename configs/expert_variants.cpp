#include "configs/expert_variants.h"

#include "configs/timed_tables.h"

namespace upmoe {

namespace {

constexpr std::string_view kHead =
    "# For each device: the routed experts' fused kernels whose fastest variant is not the first one of\n"
    "# kernels/core/expert_variant.h, which has them all. Written by tests/bench/time_variants; part of the "
    "program when it\n"
    "# is built. Bits do not depend on it.\n";

constexpr std::array<std::pair<std::string_view, TileOrder>, 2> kOrders{
    {{"rows", TileOrder::kRows}, {"columns", TileOrder::kColumns}}};

// One kernel as its file has it.
struct Line {
  std::string kernel, order;
  ExpertProductShape shape;
  ExpertVariant variant;
};

Schema schema_of(Line& line) {
  const NumberCheck size{.least = 1, .required = true}, lag{.least = 0, .required = true};
  const TextCheck text{.required = true};
  Schema schema;
  schema.section("")
      .key("kernel", line.kernel, text)
      .key("experts", line.shape.experts, size)
      .key("width", line.shape.width, size)
      .key("neurons", line.shape.neurons, size)
      .key("rows", line.shape.rows, size)
      .key("blocks", line.variant.blocks, size)
      .key("stages", line.variant.stages, size)
      .key("order", line.order, text)
      .key("lag", line.variant.lag, lag);
  return schema;
}

void read_kernel(const YamlNode& node, VariantOfShape& table, Problems& problems) {
  std::array<std::pair<std::string_view, ExpertKernel>, kExpertKernels> kernels;
  for (std::size_t i = 0; i < kernels.size(); ++i)
    kernels[i] = {name_of(static_cast<ExpertKernel>(i)), static_cast<ExpertKernel>(i)};
  Line line;
  Schema schema = schema_of(line);
  Problems wrong;
  schema.read(node, wrong);
  schema.check_required(node.where, wrong);
  if (wrong.empty()) {
    line.shape.kernel = read_word(kernels, line.kernel, node.where, wrong);
    line.variant.order = read_word(kOrders, line.order, node.where, wrong);
  }
  if (wrong.empty()) {
    const std::string why = why_not(line.variant, line.shape);
    if (!why.empty()) wrong.add(node.where, fmt::format("{}: {}", words_of(line.shape), why));
  }
  if (wrong.empty() && !table.emplace(line.shape, line.variant).second)
    wrong.add(node.where, fmt::format("a second line for {}", words_of(line.shape)));
  for (const std::string& text : wrong.list()) problems.add(text);
}

void read_table(const YamlNode& node, ExpertVariants& variants, Problems& problems) {
  std::string device;
  VariantOfShape table;
  Schema schema;
  schema.section("").key("device", device, TextCheck{.required = true});
  add_list(schema, "kernels",
           [&](const YamlNode& item, Problems& wrong) { read_kernel(item, table, wrong); });
  schema.read(node, problems);
  schema.check_required(node.where, problems);
  if (!variants.tables.emplace(device, std::move(table)).second)
    problems.add(node.where, fmt::format("a second table for {}", device));
}

}  // namespace

ExpertVariants parse_expert_variants(std::string_view yaml, const std::string& where) {
  ExpertVariants variants;
  read_timed_tables(yaml, where,
                    [&](const YamlNode& item, Problems& problems) { read_table(item, variants, problems); });
  return variants;
}

std::string to_yaml(const ExpertVariants& variants) {
  std::string text(kHead);
  text += variants.tables.empty() ? "tables: []\n" : "tables:\n";
  for (const auto& [device, table] : variants.tables) {
    text += fmt::format("  - device: {}\n    kernels:{}\n", yaml_quoted(device), table.empty() ? " []" : "");
    for (const auto& [s, v] : table)
      text += fmt::format(
          "      - {{kernel: {}, experts: {}, width: {}, neurons: {}, rows: {}, blocks: {}, stages: {}, "
          "order: {}, "
          "lag: {}}}\n",
          name_of(s.kernel), s.experts, s.width, s.neurons, s.rows, v.blocks, v.stages, name_of(v.order),
          v.lag);
  }
  return text;
}

const ExpertVariants& committed_expert_variants() {
  static const ExpertVariants variants =
      parse_expert_variants(expert_variants_text(), "configs/cuda/expert_variants.yaml");
  return variants;
}

}  // namespace upmoe
