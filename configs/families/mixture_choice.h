#pragma once
// As which family's model a mixture is written that a dense model becomes.

#include <optional>
#include <string>

#include "configs/families/family.h"

namespace upmoe {

// A mixture as a recipe wants it: `shape` has everything but the family and whether the shared expert has a gate.
struct WantedMixture {
  ModelConfig shape;
  // A model_type, or empty: the first of the dense family's mixtures that carries the rest.
  std::string family;
  std::optional<bool> gate;  // of the shared expert; empty: the family's own form
};

// The same mixture in the form of a family, which need not carry it.
ModelConfig in_form_of(const Family& family, const WantedMixture& wanted);

struct MixtureChoice {
  const Family* family = nullptr;  // null: see `problem`
  std::string problem;             // one sentence: what is not carried by whom, and which families carry it
};
MixtureChoice choose_mixture(const Family& dense, const WantedMixture& wanted);

}  // namespace upmoe
