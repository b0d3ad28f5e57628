#pragma once
// Where the tensors of a recipe lie in the files of a Hugging Face directory, and who makes which part of them.

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <vector>

#include "data/hf_writer.h"
#include "upcycle/recipe.h"
#include "upcycle/transforms.h"

namespace upmoe {

// One file is cut without regard to where its tensors end; only the last piece is shorter than the others:
//
//   file     | header | layer 0 ........................ | layer 1 ................... | ... |
//   pieces   |      0      |      1      |      2      |      3      |      4      |   5     |
//
// So all ranks and threads have the same to do, and every write starts at a disk block.
// A stretch of one output file, or the error of one layer, which writes nothing.
struct Piece {
  std::size_t file = 0;
  std::uint64_t begin = 0, end = 0;
  int error_of_layer = -1;
};

// Refers to both for as long as it lives.
class FileMap {
 public:
  FileMap(const Recipe& recipe, const HfLayout& layout);
  // Bytes [piece.begin, piece.end) of a file: of its header and of the tensors that lie there.
  void fill_piece(const Piece& piece, const FillContext& context, std::span<std::byte> out) const;
  // Everything to be done, in the order of the files; the same list on every rank. A layer's error comes right after
  // its last expert matrix, while its dense FFN is still at hand.
  std::vector<Piece> pieces(DType dtype, std::uint64_t piece_bytes) const;

 private:
  struct Place {
    const RecipeLine* line = nullptr;  // null: zeros
    int layer = -1;                    // whose experts, routed or shared, it is part of; -1: of none
  };
  template <class Visit>
  void for_each_tensor(const Piece& piece, const Visit& visit) const;
  // The layers whose last expert matrix ends in this piece.
  std::set<int> layers_ending_in(const Piece& piece, std::map<int, std::uint64_t>& bytes_left) const;
  std::map<int, std::uint64_t> expert_bytes_by_layer(DType dtype) const;

  const HfLayout& layout_;
  std::vector<std::vector<Place>> places_;  // by file and entry
};

// A rank's share: neighbouring pieces, by bytes.
std::vector<Piece> share_of(const std::vector<Piece>& pieces, int rank, int ranks);

}  // namespace upmoe
