#include "upcycle/file_map.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace upmoe {
namespace {

// Of each line the layer whose experts, routed or shared, it is part of; -1: of none.
std::vector<int> layers_of_lines(const Recipe& recipe) {
  std::vector<int> layers(recipe.lines.size(), -1);
  for (std::size_t layer = 0; layer < recipe.layers.size(); ++layer) {
    const auto note = [&](const std::array<int, 3>& lines) {
      for (const int line : lines)
        if (line >= 0) layers[static_cast<std::size_t>(line)] = static_cast<int>(layer);
    };
    for (const std::array<int, 3>& expert : recipe.layers[layer].experts) note(expert);
    note(recipe.layers[layer].shared);
  }
  return layers;
}

}  // namespace

FileMap::FileMap(const Recipe& recipe, const HfLayout& layout) : layout_(layout) {
  const std::vector<int> layers = layers_of_lines(recipe);
  std::map<std::string, Place> lines;
  for (std::size_t i = 0; i < recipe.lines.size(); ++i)
    lines[recipe.lines[i].target] = {&recipe.lines[i], layers[i]};
  for (const HfLayout::File& file : layout.files) {
    auto& in_file = places_.emplace_back();
    for (const SafetensorsEntry& entry : file.entries) {
      if (layout.zeros.contains(entry.name)) {
        in_file.push_back({});
        continue;
      }
      const auto found = lines.find(entry.name);
      UPMOE_CHECK(found != lines.end(), "no recipe line for {}", entry.name);
      in_file.push_back(found->second);
      lines.erase(found);
    }
  }
  UPMOE_CHECK(lines.empty(), "{} has no place in the files", lines.begin()->first);
}

// visit(entry, begin, end) with the part of each tensor inside the piece, in offsets of the file.
template <class Visit>
void FileMap::for_each_tensor(const Piece& piece, const Visit& visit) const {
  const HfLayout::File& file = layout_.files[piece.file];
  const std::uint64_t header = file.header.size();
  auto at = std::partition_point(file.entries.begin(), file.entries.end(),
                                 [&](const SafetensorsEntry& e) { return header + e.end <= piece.begin; });
  for (; at != file.entries.end() && header + at->begin < piece.end; ++at) {
    visit(static_cast<std::size_t>(at - file.entries.begin()), std::max(piece.begin, header + at->begin),
          std::min(piece.end, header + at->end));
  }
}

void FileMap::fill_piece(const Piece& piece, const FillContext& context, std::span<std::byte> out) const {
  const HfLayout::File& file = layout_.files[piece.file];
  const std::uint64_t header = file.header.size();
  if (piece.begin < header) {
    const std::uint64_t bytes = std::min(header, piece.end) - piece.begin;
    std::memcpy(out.data(), file.header.data() + piece.begin, bytes);
  }
  for_each_tensor(piece, [&](std::size_t i, std::uint64_t begin, std::uint64_t end) {
    const std::uint64_t start = header + file.entries[i].begin;
    const std::span<std::byte> part = out.subspan(begin - piece.begin, end - begin);
    if (const RecipeLine* line = places_[piece.file][i].line) {
      fill_bytes(*line, begin - start, end - start, context, part);
    } else {
      std::fill(part.begin(), part.end(), std::byte{0});
    }
  });
}

std::set<int> FileMap::layers_ending_in(const Piece& piece, std::map<int, std::uint64_t>& bytes_left) const {
  std::set<int> layers;
  for_each_tensor(piece, [&](std::size_t i, std::uint64_t begin, std::uint64_t end) {
    const int layer = places_[piece.file][i].layer;
    if (layer >= 0 && (bytes_left[layer] -= end - begin) == 0) layers.insert(layer);
  });
  return layers;
}

std::map<int, std::uint64_t> FileMap::expert_bytes_by_layer(DType dtype) const {
  std::map<int, std::uint64_t> bytes;
  for (const std::vector<Place>& file : places_)
    for (const auto& [line, layer] : file)
      if (layer >= 0)
        bytes[layer] += static_cast<std::uint64_t>(line->rows() * line->columns()) * size_of(dtype);
  return bytes;
}

std::vector<Piece> FileMap::pieces(DType dtype, std::uint64_t piece_bytes) const {
  std::map<int, std::uint64_t> bytes_left = expert_bytes_by_layer(dtype);
  std::vector<Piece> pieces;
  for (std::size_t f = 0; f < layout_.files.size(); ++f) {
    for (std::uint64_t at = 0; at < layout_.files[f].bytes; at += piece_bytes) {
      const Piece piece{f, at, std::min(at + piece_bytes, layout_.files[f].bytes), -1};
      pieces.push_back(piece);
      for (const int layer : layers_ending_in(piece, bytes_left)) pieces.push_back({0, 0, 0, layer});
    }
  }
  return pieces;
}

std::vector<Piece> share_of(const std::vector<Piece>& pieces, int rank, int ranks) {
  std::uint64_t total = 0, before = 0;
  for (const Piece& p : pieces) total += p.end - p.begin;
  std::vector<Piece> mine;
  for (const Piece& p : pieces) {
    // Where the piece's middle lies decides; sizes stay far below 2^53.
    // A layer's error has no bytes and goes with the place where it stands, at a border perhaps to the next rank, which
    // then reads that layer's FFN for it.
    const double middle = static_cast<double>(before) + static_cast<double>(p.end - p.begin) / 2;
    const int owner = std::min(ranks - 1, static_cast<int>(middle * ranks / static_cast<double>(total)));
    if (owner == rank) mine.push_back(p);
    before += p.end - p.begin;
  }
  return mine;
}

}  // namespace upmoe
