#include "upcycle/recipe_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <map>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

// model.layers.3.mlp.experts.17.gate_proj.weight -> model.layers.*.mlp.experts.*.gate_proj.weight
std::string pattern_of(const std::string& name) {
  std::string out;
  for (std::size_t i = 0; i < name.size(); ++i) {
    const bool starts_number =
        std::isdigit(static_cast<unsigned char>(name[i])) != 0 && i > 0 && name[i - 1] == '.';
    if (!starts_number) {
      out += name[i];
      continue;
    }
    out += '*';
    while (i + 1 < name.size() && std::isdigit(static_cast<unsigned char>(name[i + 1])) != 0) ++i;
  }
  return out;
}

std::string drawn_from(const Redraw& redraw) {
  if (!redraw.from_source) return fmt::format("N(0, {})", redraw.std);
  return redraw.block ? "N(mean, std of what they replace)" : "N(mean, std of the source matrix)";
}

std::string words_of(const Copy&) {
  return "copy";
}

std::string words_of(const FreshInit& init) {
  switch (init.kind) {
    case FreshInit::Kind::kConstant:
      return fmt::format("constant {}", init.constant);
    case FreshInit::Kind::kUniform:
      return fmt::format("centred uniform, std {}", init.std);
    case FreshInit::Kind::kNormal:
      break;
  }
  const std::string normal = fmt::format("N(0, {})", init.std);
  return init.rows_per_draw == 1 ? normal : fmt::format("{}, {} rows alike", normal, init.rows_per_draw);
}

std::string words_of(const RepeatedRows& repeated) {
  const std::string words = fmt::format("the {} rows of the source, over and over", repeated.rows);
  return repeated.noise == 0 ? words : fmt::format("{}, noise {} on copies", words, repeated.noise);
}

std::string words_of(const GivenRows& given) {
  return given.noise == 0 ? "from tokens" : fmt::format("from tokens, noise {}", given.noise);
}

std::string words_of(const ExpertMatrix& m) {
  const UnitMap& map = m.map;
  std::string words;
  switch (map.rule) {
    case UnitMap::Rule::kRange:
      words = map.width == map.source_width
                  ? "all neurons"
                  : fmt::format("{} of {} neurons in order", map.width, map.source_width);
      if (map.width > map.source_width) words = fmt::format("all {} neurons, padded", map.source_width);
      break;
    case UnitMap::Rule::kWrap:
      words = fmt::format("{} consecutive neurons of {}", map.width, map.source_width);
      break;
    case UnitMap::Rule::kPermuted:
      words = fmt::format("{} neurons of {} in the layer's random order", map.width, map.source_width);
      break;
    case UnitMap::Rule::kGiven:
      words = fmt::format("{} of {} neurons, chosen by tokens", map.width, map.source_width);
      break;
    case UnitMap::Rule::kShuffle:
      words = fmt::format("{} neurons of shuffled copies of {}", map.width, map.source_width);
      break;
    case UnitMap::Rule::kNew:
      words = drawn_from(m.redraw);
      break;
    case UnitMap::Rule::kPadding:
      words = m.matrix == FfnMatrix::kDown ? "zero" : drawn_from(m.redraw);
      break;
  }
  if (map.redrawn > 0)
    words +=
        fmt::format(", {} redrawn {}{}", map.redrawn, map.joint ? "" : "per matrix ", drawn_from(m.redraw));
  if (m.noise > 0) {
    words += fmt::format(", noise {}", m.noise);
    if (map.noisy) words += fmt::format(" on {}{}", *map.noisy, map.joint ? "" : " per matrix");
  }
  if (m.scale != 1) words += fmt::format(", x {}", m.scale);
  return words;
}

struct Row {
  std::string target, shape, words;
  std::int64_t tensors = 0, elements = 0;
};

std::vector<Row> rows_of(const Recipe& recipe) {
  std::vector<Row> rows;
  std::map<std::string, std::size_t> index;
  for (const RecipeLine& line : recipe.lines) {
    Row row{pattern_of(line.target), fmt::format("[{}]", fmt::join(line.shape, ", ")),
            std::visit([](const auto& t) { return words_of(t); }, line.transform)};
    const auto [it, fresh] = index.emplace(row.target + row.shape + row.words, rows.size());
    if (fresh) rows.push_back(std::move(row));
    Row& at = rows[it->second];
    ++at.tensors;
    at.elements += line.rows() * line.columns();
  }
  return rows;
}

}  // namespace

std::string describe(const Recipe& recipe) {
  const std::vector<Row> rows = rows_of(recipe);
  std::size_t name_width = 6, shape_width = 5;
  Row total;
  for (const Row& row : rows) {
    name_width = std::max(name_width, row.target.size());
    shape_width = std::max(shape_width, row.shape.size());
    total.tensors += row.tensors;
    total.elements += row.elements;
  }
  std::string out = fmt::format("{:<{}}  {:>7}  {:<{}}  {}\n", "tensor", name_width, "tensors", "shape",
                                shape_width, "made of");
  for (const Row& row : rows) {
    out += fmt::format("{:<{}}  {:>7}  {:<{}}  {}\n", row.target, name_width, row.tensors, row.shape,
                       shape_width, row.words);
  }
  std::map<std::string, std::int64_t> dropped;
  for (const std::string& name : recipe.dropped) ++dropped[pattern_of(name)];
  for (const auto& [name, count] : dropped) out += fmt::format("not used: {} ({} tensors)\n", name, count);
  out += fmt::format("{} tensors, {} parameters\n", total.tensors, total.elements);
  return out;
}

}  // namespace upmoe
