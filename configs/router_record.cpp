#include "configs/router_record.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "configs/families/family.h"
#include "configs/json_reader.h"
#include "configs/json_writer.h"
#include "kernels/core/expert_groups.h"

namespace upmoe {
namespace {

constexpr const char* kKey = "upmoe_router";
constexpr int kMostSequences = 1 << 20;

// Of the routers, what the family's own files have no word for.
Traits without_words(const ModelConfig& c) {
  return (traits_of(c) & kRouterTraits).without(family_of(c).carries);
}

template <class Enum>
void read_name(JsonObject& router, const char* key, Enum& target) {
  const auto name = router.text(key, false);
  if (!name) return;
  const auto known = value_named<Enum>(*name);
  if (!known) router.refuse(key, fmt::format("found '{}', which this program does not know", *name));
  if (known) target = *known;
}

// Of training alone, and of groups of tokens.
void read_training(JsonObject& router, RouterForm& form) {
  read_name(router, "kind", form.kind);
  if (const auto jitter = router.number("jitter", false)) form.jitter = *jitter;
  if (const auto factor = router.number("capacity_factor", false)) form.capacity_factor = *factor;
  read_name(router, "capacity_pool", form.capacity_pool);
  read_name(router, "drop", form.drop);
  if (const auto n = router.integer("group_size", 0, kMostSequences, false))
    form.group_size = static_cast<int>(*n);
  if (const auto t = router.number("temperature", false)) form.temperature = *t;
  if (!(form.temperature >= kLeastTemperature))
    router.refuse("temperature",
                  fmt::format("found {}, expected at least {}", form.temperature, kLeastTemperature));
  if (!(form.jitter >= 0 && form.jitter < 1))
    router.refuse("jitter", fmt::format("found {}, expected 0 to below 1", form.jitter));
  if (!(form.capacity_factor >= 0))
    router.refuse("capacity_factor", fmt::format("found {}, expected at least 0", form.capacity_factor));
}

void write_training(JsonWriter& router, const RouterForm& form) {
  if (form == form.served() && !form.routes_groups()) return;
  router.set("kind", name_of(form.kind));
  router.set("jitter", form.jitter);
  router.set("capacity_factor", form.capacity_factor);
  router.set("capacity_pool", name_of(form.capacity_pool));
  router.set("drop", name_of(form.drop));
  if (!form.routes_groups()) return;
  router.set("group_size", form.group_size);
  router.set("temperature", form.temperature);
}

// What a model that is trained with this kind has.
struct KindNeeds {
  int choices = 0;  // 0: any number
  std::optional<bool> renormalized = {};
  const char* why = "";
};
std::optional<KindNeeds> needs_of(RouterKind kind) {
  switch (kind) {
    case RouterKind::kTopK:
      return std::nullopt;
    case RouterKind::kNoisy:
    case RouterKind::kExpertChoice:
    case RouterKind::kMixtureOfTokens:
      return KindNeeds{};
    case RouterKind::kSwitch:
      return KindNeeds{1, false, "over their sum one weight is always 1, and the router would not learn"};
    case RouterKind::kGShard:
      return KindNeeds{2, true, "the second choice's probability is of a weight over both weights' sum"};
  }
  fail(ExitCode::kFailure, "no router of this kind");
}

void add_kind_problems(const ModelConfig& model, std::vector<std::string>& found) {
  const RouterForm& form = model.router;
  const std::optional<KindNeeds> needs = needs_of(form.kind);
  if (!needs) return;
  const char* kind = name_of(form.kind);
  if (form.score != RouterScore::kSoftmax)
    found.push_back(fmt::format("router.kind: {} with router.score {}; use softmax, or kind topk", kind,
                                name_of(form.score)));
  if (needs->choices > 0 && model.num_experts_per_tok != needs->choices)
    found.push_back(fmt::format(
        "router.kind: {} gives a token {} of the experts, and the model's num_experts_per_tok is {}; use "
        "kind topk",
        kind, needs->choices, model.num_experts_per_tok));
  if (needs->renormalized && model.norm_topk_prob != *needs->renormalized)
    found.push_back(fmt::format("router.kind: {}, and the model's norm_topk_prob is {}: {}; use kind topk",
                                kind, model.norm_topk_prob, needs->why));
}

// Of kinds that route groups of tokens.
void add_group_problems(const RunConfig::Router& router, const ModelConfig& model,
                        std::vector<std::string>& found) {
  const RouterForm& form = model.router;
  if (!form.routes_groups()) return;
  const char* kind = name_of(form.kind);
  if (form.group_size < 2)
    found.push_back(
        fmt::format("router.group_size: {}, and router.kind {} routes the tokens of several sequences at one "
                    "position together; use a divisor of train.micro_batch, 2 or more",
                    form.group_size, kind));
  if (std::any_of(router.aux_loss.begin(), router.aux_loss.end(), [](double c) { return c > 0; }))
    found.push_back(
        fmt::format("router.aux_loss: of router.kind {}, whose experts all get the same; use 0", kind));
  if (form.kind == RouterKind::kExpertChoice && form.capacity_factor > model.num_experts)
    found.push_back(fmt::format("router.capacity_factor: {} experts of a token, and the model has {}",
                                form.capacity_factor, model.num_experts));
  if (form.kind != RouterKind::kMixtureOfTokens) return;
  const auto refuse = [&](const char* key, double value, double without) {
    if (value != without)
      found.push_back(fmt::format("router.{}: {} is of choices, and router.kind {} has none; use {}", key,
                                  value, kind, without));
  };
  refuse("capacity_factor", form.capacity_factor, 0);
  refuse("jitter", form.jitter, 0);
  refuse("scale", form.scale, 1);
  refuse("z_loss", router.z_loss, 0);
}

}  // namespace

void read_router(JsonObject& json, ModelConfig& c) {
  if (!json.has(kKey)) return;
  const std::unique_ptr<JsonObject> router = json.object(kKey);
  if (router == nullptr) return;
  read_name(*router, "score", c.router.score);
  if (const auto n = router->integer("groups", 1, kMostExpertGroups, false))
    c.router.groups = static_cast<int>(*n);
  if (const auto n = router->integer("group_topk", 1, kMostExpertGroups, false))
    c.router.group_topk = static_cast<int>(*n);
  if (const auto scale = router->number("scale", false)) c.router.scale = *scale;
  if (const auto bias = router->truth("bias", false)) c.router_bias = *bias;
  if (const auto load = router->truth("load", false)) c.router_load = *load;
  read_training(*router, c.router);
}

void write_router(const ModelConfig& c, JsonWriter& json) {
  json.erase(kKey);
  const bool plain = c.router == c.router.served() && !c.router.routes_groups();
  if (plain && !c.router_load && without_words(c).none()) return;
  JsonWriter router;
  router.set("score", name_of(c.router.score));
  router.set("groups", c.router.groups);
  router.set("group_topk", c.router.group_topk);
  router.set("scale", c.router.scale);
  router.set("bias", c.router_bias);
  if (c.router_load) router.set("load", true);
  write_training(router, c.router);
  json.set(kKey, router);
}

ModelConfig with_router(ModelConfig model, const RunConfig::Router& router) {
  if (model.num_moe_layers() == 0) return model;
  RouterForm& form = model.router;
  form.score = router.score.value_or(form.score);
  form.groups = router.groups.value_or(form.groups);
  form.group_topk = router.group_topk.value_or(form.group_topk);
  form.scale = router.scale.value_or(form.scale);
  form.kind = router.kind.value_or(form.kind);
  form.jitter = router.jitter.value_or(form.jitter);
  form.capacity_factor = router.capacity_factor.value_or(form.capacity_factor);
  form.capacity_pool = router.capacity_pool.value_or(form.capacity_pool);
  form.drop = router.drop.value_or(form.drop);
  // No other kind has them.
  form.group_size = form.routes_groups() ? router.group_size.value_or(form.group_size) : 0;
  form.temperature = form.routes_groups() ? router.temperature.value_or(form.temperature) : 1;
  model.router_bias = model.router_bias || router.bias_rate > 0;
  model.router_load = model.router_load || router.has_term(AuxKind::kGlobal);
  return model;
}

std::vector<std::string> router_problems(const RunConfig::Router& router, const ModelConfig& model) {
  std::vector<std::string> found;
  const RouterForm& form = model.router;
  if (model.num_moe_layers() == 0) return found;
  if (router.aux_kind.size() != router.aux_loss.size())
    found.push_back(
        fmt::format("router.aux_loss: {} coefficients for the {} kinds of router.aux_kind; one for each",
                    router.aux_loss.size(), router.aux_kind.size()));
  if (router.has_term(AuxKind::kGroup) &&
      (router.aux_groups < 2 || model.num_experts % router.aux_groups != 0))
    found.push_back(fmt::format(
        "router.aux_groups: {}, but router.aux_kind group balances groups of equal size; use a divisor of "
        "the model's {} experts, 2 or more",
        router.aux_groups, model.num_experts));
  if (form.score != RouterScore::kSigmoid) {
    const std::string with = fmt::format("with router.score {}; use sigmoid", name_of(form.score));
    if (router.bias_rate > 0) found.push_back(fmt::format("router.bias_rate: {} {}", router.bias_rate, with));
    if (form.groups > 1) found.push_back(fmt::format("router.groups: {} {}, or 1", form.groups, with));
  }
  add_kind_problems(model, found);
  add_group_problems(router, model, found);
  if (router.has_term(AuxKind::kLoad) && form.kind != RouterKind::kNoisy)
    found.push_back(fmt::format(
        "router.aux_kind: load is of the noise of router.kind noisy, and the kind is {}; use importance",
        name_of(form.kind)));
  if (model.num_experts % form.groups != 0 || model.num_experts < 2 * form.groups) {
    if (form.groups > 1)
      found.push_back(
          fmt::format("router.groups: {} does not divide the model's {} experts into groups of two or more",
                      form.groups, model.num_experts));
    return found;
  }
  if (form.group_topk > form.groups)
    found.push_back(fmt::format("router.group_topk: {} of {} groups", form.group_topk, form.groups));
  const int eligible = model.num_experts / form.groups * std::min(form.group_topk, form.groups);
  if (eligible < model.num_experts_per_tok)
    found.push_back(fmt::format(
        "router.group_topk: {} of {} groups hold {} experts, and the model's num_experts_per_tok is {}",
        form.group_topk, form.groups, eligible, model.num_experts_per_tok));
  return found;
}

std::string words_of(const RouterForm& form) {
  std::string words = fmt::format("score {}, groups {}, group_topk {}, scale {}", name_of(form.score),
                                  form.groups, form.group_topk, form.scale);
  if (form.routes_groups()) {
    words += fmt::format(", kind {}, group_size {}, capacity_factor {}, temperature {}", name_of(form.kind),
                         form.group_size, form.capacity_factor, form.temperature);
    if (form.jitter > 0) words += fmt::format(", jitter {}", form.jitter);
  } else if (form != form.served()) {
    words +=
        fmt::format(", kind {}, jitter {}, capacity_factor {}, capacity_pool {}, drop {}", name_of(form.kind),
                    form.jitter, form.capacity_factor, name_of(form.capacity_pool), name_of(form.drop));
  }
  return words;
}

void require_same_router(const ModelConfig& saved, const ModelConfig& asked, const std::string& checkpoint) {
  if (saved.router == asked.router) return;
  fail(ExitCode::kUsage,
       "router: the run asks for {}, but its routers in {} were trained with "
       "{}; restore these keys, or train with the others in another run.dir",
       words_of(asked.router), checkpoint, words_of(saved.router));
}

std::string why_not_exported(const ModelConfig& c) {
  if (c.num_moe_layers() == 0) return "";
  if (c.router.routes_groups())
    return fmt::format(
        "its routers ({}) share the experts among the tokens of several sequences, and a "
        "reader of {} has to choose for each token by itself: it would compute something else",
        words_of(c.router.served()), c.model_type);
  const Traits lost = without_words(c).without({Trait::kChoiceBias});
  if (lost.none()) return "";
  return fmt::format(
      "{}'s config.json has no words for its routers ({}): "
      "whoever reads the files would choose other experts",
      c.model_type, lost.words());
}

}  // namespace upmoe
