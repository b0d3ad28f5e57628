#pragma once
// What every trained tensor of the mixture is made of: one line per tensor on disk, pure data; buffers begin at zero.
// The value of an element depends only on the line, the seed and the element's place in the tensor (transforms.h).

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "configs/families/family.h"
#include "configs/model_config.h"
#include "configs/upcycle_config.h"
#include "upcycle/calibration.h"
#include "upcycle/unit_map.h"

namespace upmoe {

// The same tensor of the dense model, bit for bit; or the mean of those of the first `average_of` dense models, rounded
// once.
struct Copy {
  std::string from;
  int average_of = 1;
};

// How redrawn neurons, and the gate and up rows of padding, are drawn.
struct Redraw {
  bool from_source = true;  // normal with mean and deviation of the source matrix; false: N(0, std)
  bool block = false;       // of what the redraw replaces in it, where that is anything, instead of all of it
  double std = 0.02;
};

// One matrix of one expert, routed or shared: its units from the dense FFN's matrix of the same kind.
struct ExpertMatrix {
  std::string from;
  FfnMatrix matrix = FfnMatrix::kGate;
  UnitMap map;
  Redraw redraw;
  int source = 0;      // which dense model's, the first one being 0
  double noise = 0.0;  // deviation of normal noise on kept units, of those that may get it (map.noisy)
  double scale = 1.0;  // of the whole matrix; applied in fp32, rounded once
};

// Numbers of no source. Row r of the tensor takes row r / rows_per_draw of the numbers, so
// neighbouring rows can agree.
struct FreshInit {
  enum class Kind : std::uint8_t { kNormal, kUniform, kConstant } kind = Kind::kNormal;  // uniform: centred
  double std = 0.02;
  double constant = 0.0;
  std::int64_t rows_per_draw = 1;
};

// The rows of a router, over and over: row r is the source's row r modulo `rows`, from row `rows` on with noise.
struct RepeatedRows {
  std::string from;
  std::int64_t rows = 0;  // of the source
  double noise = 0.0;     // standard deviation
};

// Numbers that tokens told, and noise.
struct GivenRows {
  std::shared_ptr<const std::vector<float>> values;  // row-major; null where a recipe is only described
  double noise = 0.0;                                // standard deviation
};

using Transform = std::variant<Copy, ExpertMatrix, FreshInit, RepeatedRows, GivenRows>;

struct RecipeLine {
  std::string target;               // name on disk; also keys the random numbers
  std::vector<std::int64_t> shape;  // on disk
  Transform transform;
  std::int64_t rows() const { return shape.empty() ? 1 : shape[0]; }
  std::int64_t columns() const;
};

// Of a feed-forward network, routed, shared or dense: which of its matrices this part of a parameter is.
FfnMatrix matrix_of(Half half);
// The tensor on disk of a dense layer's FFN.
std::string ffn_name(const ModelConfig& dense, int layer, FfnMatrix matrix);

struct Recipe {
  std::uint64_t seed = 1;
  double scale = 1.0;                // of the routed experts' down projections, resolved
  std::int64_t redrawn = 0;          // neurons of every routed expert
  int copies_of_experts = 0;         // of a mixture that grows; 0: of a dense model
  std::vector<RecipeLine> lines;     // in the order of the model's tensors
  std::vector<std::string> dropped;  // dense tensors that no line reads
  // Index into `lines` of what makes up one MoE layer; -1 = there is none, as in a layer that stays dense.
  struct Layer {
    int router = -1, shared_gate = -1;
    std::array<int, 3> shared{-1, -1, -1};  // by FfnMatrix
    std::vector<std::array<int, 3>> experts;
  };
  std::vector<Layer> layers;
};

// `sources`: how many dense models there are, all of the shape `dense`; each makes as many experts, in their order.
// The recipe with every `auto` replaced by what it stands for.
UpcycleConfig resolve(const UpcycleConfig& config, const ModelConfig& dense, int sources = 1);
// Throws Error(kUsage) with problems_of(), Error(kFailure) when a tensor would be made twice or not at all.
// `calibration`: where the recipe asks for tokens (asks_for_tokens); without it such a recipe can be described, not
// made.
Recipe make_recipe(const UpcycleConfig& config, const ModelConfig& dense, int sources = 1,
                   const Calibration* calibration = nullptr);

}  // namespace upmoe
