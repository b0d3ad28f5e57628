#pragma once
// What one rank adds to a checkpoint made by upcycling, and how its values come about block by block.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "data/hf_model.h"
#include "data/store_writer.h"
#include "upcycle/recipe.h"
#include "upcycle/transforms.h"

namespace upmoe {

// All parameters one behind the other in the order of the table, divided into stretches of equal length: a rank
// holds whole parameters and flat ranges of the first and the last one. Where the cuts lie changes no value.
class StoreShare {
 public:
  StoreShare(const Recipe& recipe, const ModelConfig& moe, DType dtype, int rank, int ranks,
             std::uint64_t block_bytes);

  // A block of a piece, or the error of one layer, which adds nothing to the file. A layer's error comes
  // right after its last expert matrix, while its dense FFN is still at hand.
  struct Task {
    StoreBlock block;
    int error_of_layer = -1;
  };
  const std::vector<Task>& tasks() const { return tasks_; }
  const std::vector<StorePiece>& pieces() const { return pieces_; }
  std::uint64_t bytes() const;
  // The values of a block in the order of its parameter. Safe for several threads.
  void fill(const StoreBlock& block, const FillContext& context, std::span<std::byte> out) const;

 private:
  struct Tensor {  // on disk in a Hugging Face directory: a part of a parameter
    const RecipeLine* line;
    Box part;
  };
  struct Parameter {
    Shape shape;
    Range owned;  // flat
    std::vector<Tensor> tensors;
  };
  void add(const ParamSpec& spec, Range owned, std::vector<Tensor> tensors);
  void add_tasks(std::uint64_t block_bytes);

  DType dtype_;
  std::vector<Parameter> parameters_;  // those of which this rank holds something, as `pieces_`
  std::vector<StorePiece> pieces_;
  std::vector<int> last_of_layer_;  // by piece: the layer whose last expert matrix ends in it, or -1
  std::vector<Task> tasks_;
};

}  // namespace upmoe
