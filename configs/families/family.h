#pragma once
// Model families: what one `model_type` of Hugging Face says in its config.json, what it calls its tensors, and what
// its layers are like. The rest of the program knows ModelConfig and the roles of parameters alone.

#include <span>
#include <string>

#include "configs/families/traits.h"
#include "configs/model_config.h"
#include "configs/param_table.h"

namespace upmoe {

class JsonObject;
class JsonWriter;

// A tensor on disk, or one for each block ({0} in the name) and routed expert ({1}), and what it holds: of the
// parameter of this role the expert and the half that it speaks of. Rows of names that are the same are one tensor, in
// this order; so are all experts of a routed one without {1}.
struct TensorName {
  Role role;
  Half half;
  const char* name;
  bool transposed = false;  // an expert's down projection as [width, model width]
  bool by_block() const;
  bool by_expert() const;
  std::string of(int layer, std::int64_t expert) const;
};

struct Family {
  const char* model_type;
  const char* architecture;  // transformers' class of the causal language model
  // From and to config.json; model_type and architectures are read and written for all.
  void (*read)(JsonObject& json, ModelConfig& config);
  void (*write)(const ModelConfig& config, JsonWriter& json);
  // Keys that are this family's own: known where a file of it has them, taken out where another family is written.
  std::span<const char* const> keys;
  // In the order of transformers' state dict: before the blocks, of a block, behind them. Tensors by expert that
  // follow each other are listed expert by expert.
  std::span<const TensorName> tensors;
  // What the layers of all its models have, beside what their files say; absent: nothing.
  void (*layers)(ModelConfig& config) = nullptr;
  // transformers makes the modules of the shared expert even where its width is 0: tensors that nobody reads.
  bool empty_shared_expert = false;

  // What its models can have of what models differ in. A model with any other trait is not written as this family's.
  Traits carries;
  // Of a dense family: the model_types of the mixtures that it can become, the one to take first in front.
  std::span<const char* const> mixtures = {};
  // Of a mixture family: what else follows when a dense model becomes one (recipes say its experts and widths).
  void (*from_dense)(ModelConfig& config) = nullptr;
};

std::span<const Family* const> families();
const Family* find_family(const std::string& model_type);  // null when there is none
const Family& family_of(const ModelConfig& config);
bool is_mixture(const Family& family);  // of models with experts

// The name on disk of what holds this of a parameter.
std::string tensor_name(const ModelConfig& config, Role role, int layer = kOutsideBlocks,
                        Half half = Half::kWhole);

}  // namespace upmoe
