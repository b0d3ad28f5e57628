#include "configs/families/mixture_choice.h"

#include <fmt/format.h>

#include <vector>

namespace upmoe {
namespace {

Traits lacks(const Family& family, const WantedMixture& wanted) {
  return traits_of(in_form_of(family, wanted)).without(family.carries);
}

std::string those_that_carry(const WantedMixture& wanted) {
  std::vector<const char*> names;
  for (const Family* family : families())
    if (is_mixture(*family) && lacks(*family, wanted).none()) names.push_back(family->model_type);
  return names.empty() ? "no family known here carries all of this recipe"
                       : fmt::format("families that carry this recipe: {}", fmt::join(names, ", "));
}

MixtureChoice choose_named(const WantedMixture& wanted) {
  const Family* family = find_family(wanted.family);
  if (family == nullptr || !is_mixture(*family))
    return {nullptr, fmt::format("target.family: '{}' is no family of mixtures; {}", wanted.family,
                                 those_that_carry(wanted))};
  const Traits lacking = lacks(*family, wanted);
  if (lacking.none()) return {family, ""};
  return {nullptr, fmt::format("target.family {} does not carry: {}; {}", wanted.family, lacking.words(),
                               those_that_carry(wanted))};
}

}  // namespace

ModelConfig in_form_of(const Family& family, const WantedMixture& wanted) {
  ModelConfig moe = wanted.shape;
  moe.model_type = family.model_type;
  moe.shared_expert_gate = wanted.gate.value_or(family.carries.has(Trait::kGatedShared));
  if (family.from_dense != nullptr) family.from_dense(moe);
  return moe;
}

MixtureChoice choose_mixture(const Family& dense, const WantedMixture& wanted) {
  if (!wanted.family.empty()) return choose_named(wanted);
  std::string tried;
  for (const char* name : dense.mixtures) {
    const Family* family = find_family(name);
    UPMOE_CHECK(family != nullptr, "{}: no family '{}'", dense.model_type, name);
    const Traits lacking = lacks(*family, wanted);
    if (lacking.none()) return {family, ""};
    tried += fmt::format("{}{} does not carry: {}", tried.empty() ? "" : "; ", name, lacking.words());
  }
  if (tried.empty()) tried = "no mixture of experts of this kind is known";
  return {nullptr, fmt::format("target.family auto: model_type {}: {}; {}", dense.model_type, tried,
                               those_that_carry(wanted))};
}

}  // namespace upmoe
