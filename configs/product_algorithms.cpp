#include "configs/product_algorithms.h"

#include "configs/timed_tables.h"

namespace upmoe {

namespace {

constexpr std::string_view kHead =
    "# For each device and version of cuBLASLt: products whose fastest algorithm is not the library's first, "
    "with its place\n"
    "# among those that the library offers, from 0. Written by tests/bench/time_algorithms; part of the "
    "program when it is\n"
    "# built.\n";

// One product as its file has it.
struct Line {
  std::int64_t m = 0, n = 0, k = 0, alignment = 256;
  std::string a, b, in, out;
  bool adds = false, bias = false;
  int algorithm = -1;
};

Schema schema_of(Line& line) {
  const NumberCheck size{.least = 1, .required = true};
  const TextCheck text{.required = true};
  Schema schema;
  schema.section("")
      .key("m", line.m, size)
      .key("n", line.n, size)
      .key("k", line.k, size)
      .key("a", line.a, text)
      .key("b", line.b, text)
      .key("in", line.in, text)
      .key("out", line.out, text)
      .key("adds", line.adds)
      .key("bias", line.bias)
      .key("alignment", line.alignment, {.least = 1, .most = 256})
      .key("algorithm", line.algorithm, {.least = 0, .most = kOfferedAlgorithms - 1, .required = true});
  return schema;
}

void read_product(const YamlNode& node, AlgorithmOfShape& table, Problems& problems) {
  constexpr std::array<std::pair<std::string_view, bool>, 2> kTranspose{{{"n", false}, {"t", true}}};
  constexpr std::array<std::pair<std::string_view, DType>, 2> kTypes{
      {{"fp32", DType::kF32}, {"bf16", DType::kBF16}}};
  Line line;
  Schema schema = schema_of(line);
  Problems wrong;
  schema.read(node, wrong);
  schema.check_required(node.where, wrong);
  ProductShape shape{.m = line.m, .n = line.n, .k = line.k};
  if (wrong.empty()) {
    shape.transpose_a = read_word(kTranspose, line.a, node.where, wrong);
    shape.transpose_b = read_word(kTranspose, line.b, node.where, wrong);
    shape.in = read_word(kTypes, line.in, node.where, wrong);
    shape.out = read_word(kTypes, line.out, node.where, wrong);
    shape.adds = line.adds;
    shape.bias = line.bias;
    shape.alignment = line.alignment;
    if ((line.alignment & (line.alignment - 1)) != 0)
      wrong.add(node.where, fmt::format("alignment: {} is no power of two", line.alignment));
  }
  if (wrong.empty() && !table.emplace(shape, line.algorithm).second)
    wrong.add(node.where, fmt::format("a second line for {}", words_of(shape)));
  for (const std::string& text : wrong.list()) problems.add(text);
}

void read_table(const YamlNode& node, ProductAlgorithms& algorithms, Problems& problems) {
  ProductLibrary library;
  AlgorithmOfShape table;
  Schema schema;
  schema.section("")
      .key("device", library.device, TextCheck{.required = true})
      .key("cublaslt", library.version, {.least = 1, .required = true});
  add_list(schema, "products",
           [&](const YamlNode& item, Problems& wrong) { read_product(item, table, wrong); });
  schema.read(node, problems);
  schema.check_required(node.where, problems);
  if (!algorithms.tables.emplace(library, std::move(table)).second)
    problems.add(node.where,
                 fmt::format("a second table for {}, cuBLASLt {}", library.device, library.version));
}

}  // namespace

ProductAlgorithms parse_product_algorithms(std::string_view yaml, const std::string& where) {
  ProductAlgorithms algorithms;
  read_timed_tables(
      yaml, where, [&](const YamlNode& item, Problems& problems) { read_table(item, algorithms, problems); });
  return algorithms;
}

std::string to_yaml(const ProductAlgorithms& algorithms) {
  std::string text(kHead);
  text += algorithms.tables.empty() ? "tables: []\n" : "tables:\n";
  for (const auto& [library, table] : algorithms.tables) {
    text += fmt::format("  - device: {}\n    cublaslt: {}\n    products:{}\n", yaml_quoted(library.device),
                        library.version, table.empty() ? " []" : "");
    for (const auto& [s, algorithm] : table)
      text += fmt::format(
          "      - {{m: {}, n: {}, k: {}, a: {}, b: {}, in: {}, out: {}, adds: {}, bias: {}, alignment: {}, "
          "algorithm: {}}}\n",
          s.m, s.n, s.k, yaml_quoted(s.transpose_a ? "t" : "n"), yaml_quoted(s.transpose_b ? "t" : "n"),
          name_of(s.in), name_of(s.out), s.adds, s.bias, s.alignment, algorithm);
  }
  return text;
}

const ProductAlgorithms& committed_product_algorithms() {
  static const ProductAlgorithms algorithms =
      parse_product_algorithms(product_algorithms_text(), "configs/cuda/product_algorithms.yaml");
  return algorithms;
}

}  // namespace upmoe
