#include "configs/families/family.h"

// All families that are known, and where what one of them says is looked up.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "configs/families/gemma.h"
#include "configs/families/llama.h"
#include "configs/families/mistral.h"
#include "configs/families/qwen2.h"
#include "configs/families/qwen2_moe.h"
#include "configs/families/qwen3.h"

namespace upmoe {
namespace {

const std::array<const Family*, 6> kFamilies{&kQwen2, &kQwen2Moe, &kLlama, &kQwen3, &kMistral, &kGemma};

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

const Family& mixture_of(const Family& dense) {
  const Family* mixture = dense.mixture == nullptr ? nullptr : find_family(dense.mixture);
  if (mixture == nullptr)
    fail(ExitCode::kUsage, "model_type {}: no mixture of experts of this kind is known", dense.model_type);
  return *mixture;
}

std::string tensor_name(const ModelConfig& config, Role role, int layer, Half half) {
  const std::span<const TensorName> all = family_of(config).tensors;
  const auto found = std::find_if(all.begin(), all.end(),
                                  [&](const TensorName& t) { return t.role == role && t.half == half; });
  UPMOE_CHECK(found != all.end(), "{} has no tensor for {}", config.model_type, name_of(role));
  return found->of(layer, 0);
}

}  // namespace upmoe
