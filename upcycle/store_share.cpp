#include "upcycle/store_share.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "data/box_runs.h"

namespace upmoe {
namespace {

// The last one in the table of each layer's expert parameters.
std::map<int, std::string> last_expert_parameters(const std::vector<ParamSpec>& table) {
  std::map<int, std::string> last;
  for (const ParamSpec& p : table)
    if (p.expert) last[p.layer] = p.name;
  return last;
}

// A cut through the concatenated parameters, as a place in the one that begins at `before`: between two rows
// of its last dim, so that most tensors are cut between rows as well.
std::int64_t cut_within(const Shape& shape, std::int64_t cut, std::int64_t before) {
  const std::int64_t row = shape[shape.rank - 1];
  return std::clamp<std::int64_t>(cut - before, 0, shape.elements()) / row * row;
}

}  // namespace

StoreShare::StoreShare(const Recipe& recipe, const ModelConfig& moe, DType dtype, int rank, int ranks,
                       std::uint64_t block_bytes)
    : dtype_(dtype) {
  std::map<std::string, const RecipeLine*> lines;
  for (const RecipeLine& line : recipe.lines) lines[line.target] = &line;
  const std::vector<ParamSpec> table = make_param_table(moe);
  const std::map<int, std::string> last = last_expert_parameters(table);
  std::int64_t total = 0, before = 0;
  for (const ParamSpec& p : table) total += p.shape.elements();
  // All parameters one behind the other are cut into equal shares; a rank has the end of one, some whole ones, and the
  // beginning of another:
  //
  //   table     | embed_VD      | layers.0 ... |  ...            |
  //   ranks     |     0      |      1      |      2      |
  const Range mine = balanced(total, ranks, rank);
  for (const ParamSpec& p : table) {
    std::vector<Tensor> tensors;
    for (HfTensor& t : p.trained ? hf_tensors_of(moe, p) : std::vector<HfTensor>{}) {
      const auto found = lines.find(t.name);
      UPMOE_CHECK(found != lines.end(), "no recipe line for {}", t.name);
      tensors.push_back({found->second, t.part});
      lines.erase(found);
    }
    const Range owned{cut_within(p.shape, mine.begin, before), cut_within(p.shape, mine.end, before)};
    before += p.shape.elements();
    if (owned.size() == 0 || tensors.empty()) continue;  // a buffer begins anew
    add(p, owned, std::move(tensors));
    // Whoever has the end of a layer's experts computes that layer's error: one rank for each layer, spread as the
    // layers are.
    const bool ends = p.expert && last.at(p.layer) == p.name && owned.end == p.shape.elements();
    last_of_layer_.push_back(ends ? p.layer : -1);
  }
  UPMOE_CHECK(lines.empty(), "{} is part of no parameter", lines.begin()->first);
  add_tasks(block_bytes);
}

void StoreShare::add(const ParamSpec& spec, Range owned, std::vector<Tensor> tensors) {
  StorePiece piece;
  piece.tensor = spec.name;
  piece.kind = "weight";
  piece.global = spec.shape;
  piece.boxes = flat_range_to_boxes(whole(spec.shape), owned);
  piece.values = ConstTensorView(nullptr, {owned.size()}, dtype_, Device{});
  pieces_.push_back(std::move(piece));
  parameters_.push_back({spec.shape, owned, std::move(tensors)});
}

// Blocks of whole disk blocks, wherever rows end: a row cut in two is computed twice, which costs less than
// the page cache.
void StoreShare::add_tasks(std::uint64_t block_bytes) {
  const auto step = static_cast<std::int64_t>(block_bytes / size_of(dtype_));
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const std::int64_t n = pieces_[i].values.elements();
    for (std::int64_t at = 0; at < n; at += step) tasks_.push_back({{i, {at, std::min(at + step, n)}}, -1});
    // An empty block that only says: now. The layer's dense FFN has just been read for the experts and is still at
    // hand.
    if (last_of_layer_[i] >= 0) tasks_.push_back({{i, {n, n}}, last_of_layer_[i]});
  }
}

std::uint64_t StoreShare::bytes() const {
  std::uint64_t bytes = 0;
  for (const StorePiece& p : pieces_) bytes += p.values.bytes();
  return bytes;
}

// A tensor's elements lie in its parameter in the order in which they lie on disk, so those of them that are
// in one box of the block follow each other on disk too. In the block they may alternate with another
// tensor's, as the rows of gate and up do.
void StoreShare::fill(const StoreBlock& block, const FillContext& context, std::span<std::byte> out) const {
  const Parameter& p = parameters_.at(block.piece);
  const std::size_t element = size_of(dtype_);
  const Range flat{p.owned.begin + block.range.begin, p.owned.begin + block.range.end};
  UPMOE_CHECK(out.size() == static_cast<std::size_t>(flat.size()) * element, "{} bytes for {} elements",
              out.size(), flat.size());
  std::vector<std::byte> values;
  for (const Box& box : flat_range_to_boxes(whole(p.shape), flat)) {
    const std::span<std::byte> in_box = out.first(static_cast<std::size_t>(box.elements()) * element);
    out = out.subspan(in_box.size());
    for (const Tensor& t : p.tensors) {
      const Box region = intersect(t.part, box);
      const std::int64_t n = region.elements();
      if (n == 0) continue;
      const std::int64_t first = flat_in(t.part, region, {});
      const std::uint64_t begin = static_cast<std::uint64_t>(first) * element,
                          end = begin + static_cast<std::uint64_t>(n) * element;
      if (n == box.elements()) {
        fill_bytes(*t.line, begin, end, context, in_box);
        continue;
      }
      values.resize(end - begin);
      fill_bytes(*t.line, begin, end, context, values);
      for_runs(t.part, box, region, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
        std::memcpy(in_box.data() + static_cast<std::size_t>(to) * element,
                    values.data() + static_cast<std::size_t>(from - first) * element,
                    static_cast<std::size_t>(count) * element);
      });
    }
  }
}

}  // namespace upmoe
