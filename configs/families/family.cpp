#include "configs/families/family.h"

// All families that are known, and where what one of them says is looked up.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "configs/families/dbrx.h"
#include "configs/families/deepseek.h"
#include "configs/families/dots1.h"
#include "configs/families/gemma.h"
#include "configs/families/llama.h"
#include "configs/families/mistral.h"
#include "configs/families/mixtral.h"
#include "configs/families/qwen2.h"
#include "configs/families/qwen2_moe.h"
#include "configs/families/qwen3.h"
#include "configs/families/qwen3_moe.h"

namespace upmoe {
namespace {

const std::array<const Family*, 11> kFamilies{&kQwen2,   &kQwen2Moe, &kLlama,    &kQwen3, &kMistral, &kGemma,
                                              &kMixtral, &kQwen3Moe, &kDeepseek, &kDots1, &kDbrx};

}  // namespace

bool TensorName::by_block() const {
  return std::string_view(name).find("{0}") != std::string_view::npos;
}

bool TensorName::by_expert() const {
  return std::string_view(name).find("{1}") != std::string_view::npos;
}

std::string TensorName::of(int layer, std::int64_t expert) const {
  return fmt::format(fmt::runtime(name), layer, expert);
}

std::span<const Family* const> families() {
  return kFamilies;
}

const Family* find_family(const std::string& model_type) {
  for (const Family* family : kFamilies)
    if (model_type == family->model_type) return family;
  return nullptr;
}

const Family& family_of(const ModelConfig& config) {
  const Family* family = find_family(config.model_type);
  UPMOE_CHECK(family != nullptr, "no family '{}'", config.model_type);
  return *family;
}

bool is_mixture(const Family& family) {
  return std::any_of(family.tensors.begin(), family.tensors.end(),
                     [](const TensorName& t) { return t.role == Role::kRouter; });
}

std::string tensor_name(const ModelConfig& config, Role role, int layer, Half half) {
  const std::span<const TensorName> all = family_of(config).tensors;
  const auto found = std::find_if(all.begin(), all.end(),
                                  [&](const TensorName& t) { return t.role == role && t.half == half; });
  UPMOE_CHECK(found != all.end(), "{} has no tensor for {}", config.model_type, name_of(role));
  return found->of(layer, 0);
}

}  // namespace upmoe
