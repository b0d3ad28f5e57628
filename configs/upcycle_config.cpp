#include "configs/upcycle_config.h"

#include <fmt/format.h>

#include <limits>
#include <utility>

#include "configs/families/family.h"
#include "configs/schema.h"
#include "configs/schema_values.h"

namespace upmoe {
namespace {

constexpr double kMaxExperts = 1 << 16, kMaxWidth = 1 << 20;

constexpr const char* kAuto = "auto";

// The families of mixtures, behind auto.
void read_family(const YamlNode& node, const std::string& key, Problems& problems, std::string& target) {
  NameList names{{kAuto}, {}};
  for (const Family* family : families())
    if (is_mixture(*family)) names.built.emplace_back(family->model_type);
  if (const auto at = choice_of(node, key, names, problems)) target = *at == 0 ? "" : names.built[*at];
}

void add_target(Schema& schema, UpcycleConfig& c) {
  schema.section("target")
      .key("num_experts", c.target.num_experts, {.least = 1, .most = kMaxExperts, .required = true})
      .says("Routed experts per layer.")
      .key("num_experts_per_tok", c.target.num_experts_per_tok,
           {.least = 1, .most = kMaxExperts, .required = true})
      .says("Experts that compute a token.")
      .key("moe_intermediate_size", c.target.moe_intermediate_size,
           {.least = 1, .most = kMaxWidth, .required = true})
      .says("Width of one expert.")
      .key("shared_expert_intermediate_size", c.target.shared_expert_intermediate_size,
           {.least = 0, .most = kMaxWidth})
      .says("Width of the shared expert; 0: none.")
      .key("norm_topk_prob", c.target.norm_topk_prob)
      .says("The chosen experts' weights are scaled to sum to one.")
      .key(
          "layers", "all | every:N | last:N | first_dense:N | list of layers", false,
          [&c](const YamlNode& node, const std::string& key, Problems& problems) {
            read_layer_choice(node, key, problems, c.target.layers);
          },
          [&c] { return to_text(c.target.layers); })
      .says("Layers that become mixtures; the others stay dense. every:N: layers N-1, 2N-1, ...")
      .key(
          "family", "auto | model_type of a mixture", false,
          [&c](const YamlNode& node, const std::string& key, Problems& problems) {
            read_family(node, key, problems, c.target.family);
          },
          [&c] { return c.target.family.empty() ? kAuto : c.target.family; })
      .says(
          "Whose config.json and tensor names are written; auto: "
          "what carries this recipe for the dense model's.");
}

Schema schema_of(UpcycleConfig& c) {
  Schema schema;
  add_target(schema, c);
  schema.section("experts")
      .key("method", c.experts.method)
      .says("Which neurons of the dense feed-forward an expert is made of.")
      .key("cluster_markers", c.experts.cluster_markers, {.least = 1, .most = kMaxWidth})
      .says("Neurons of a token, the most active ones, that count where method cluster looks at tokens.")
      .key("split", c.experts.split)
      .says("Order in which method split goes through the neurons; random: one permutation of each layer.")
      .key("copies", c.experts.copies, {.least = 1})
      .says("Of each dense model's feed-forward; auto: as many as the experts need.")
      .key("reinit", c.experts.reinit, {.least = 0, .most = 1})
      .says("Share of every expert's neurons that is drawn anew.")
      .key("reinit_from", c.experts.reinit_from)
      .says("Deviation of what is drawn: the source matrix's, or initializer_range.")
      .key("reinit_stats", c.experts.reinit_stats)
      .says("Over what reinit_from source measures: the whole matrix, or the block of it that is replaced.")
      .key("reinit_sets", c.experts.reinit_sets)
      .says("Of reinit and noise_share: joint: whole neurons; per_matrix: a set each for gate, up and down.")
      .key("noise", c.experts.noise, {.least = 0})
      .says("Standard deviation of the noise on kept neurons.")
      .key("noise_share", c.experts.noise_share, {.least = 0, .most = 1})
      .says("Share of every expert's neurons that may get the noise.")
      .key("scale", c.experts.scale, {.least = 0})
      .says("Factor of the down projections; auto: what preserves the function.");
  schema.section("shared")
      .key("method", c.shared.method)
      .says("What the shared expert is made of; active: of the neurons that are active most often.")
      .key("gate", c.shared.gate)
      .says("A sigmoid of its own on the shared expert's output; auto: as the target's family has it.")
      .key("scale", c.shared.scale, {.least = 0})
      .says("Factor of the shared down projection; auto: 2 behind a gate, which begins at 1/2, else 1.");
  schema.section("router")
      .key("method", c.router.method)
      .says(
          "How the router's rows are made; prompts: the mean hidden state of token files (--prompts); "
          "neurons: the gate row of the neuron nearest to what an expert's have in common.")
      .key("std", c.router.std, {.least = 0})
      .says("Standard deviation of the router's weights; of the noise on them, where they come from tokens.");
  schema.section("sources")
      .key("rest", c.sources.rest)
      .says("Of several dense models (--from given more than once), what experts are not made of.");
  schema.section("grow")
      .key("copies", c.grow.copies, {.least = 0, .most = kMaxExperts})
      .says("Of every expert of a mixture, which is the source then; 0: the source is a dense model.")
      .key("noise", c.grow.noise, {.least = 0})
      .says("Standard deviation of the noise on the router's rows of all copies but the first.");
  schema.section("")
      .key("keep_rest", c.keep_rest)
      .says("Attention, norms, embedding and head as in the source; false: drawn anew.")
      .key("seed", c.seed, {.least = 0})
      .says("Of everything that is drawn.");
  return schema;
}

// Keys that were changed and do nothing beside the others.
std::vector<std::string> without_effect(const UpcycleConfig& c) {
  const UpcycleConfig defaults;
  std::vector<std::string> notes;
  const auto unless = [&](bool effective, bool changed, const char* key, const std::string& why) {
    if (!effective && changed) notes.push_back(fmt::format("{} has no effect: {}", key, why));
  };
  const bool drawn = c.experts.reinit > 0, random = c.experts.method == ExpertMethod::kRandom;
  const bool noisy_part = c.experts.noise > 0 && c.experts.noise_share < 1;
  unless(drawn || noisy_part, c.experts.reinit_sets != defaults.experts.reinit_sets, "experts.reinit_sets",
         random ? "experts.method random draws whole experts" : "experts.reinit is 0");
  unless(drawn && c.experts.reinit_from == ReinitFrom::kSource,
         c.experts.reinit_stats != defaults.experts.reinit_stats, "experts.reinit_stats",
         drawn ? "experts.reinit_from is config" : "experts.reinit is 0");
  unless(c.experts.noise > 0, c.experts.noise_share != defaults.experts.noise_share, "experts.noise_share",
         "experts.noise is 0");
  unless(c.experts.method == ExpertMethod::kCluster,
         c.experts.cluster_markers != defaults.experts.cluster_markers, "experts.cluster_markers",
         "experts.method is not cluster");
  unless(c.experts.method == ExpertMethod::kSplit, c.experts.split != defaults.experts.split, "experts.split",
         "experts.method is not split");
  unless(drawn || random || !c.keep_rest, c.experts.reinit_from != defaults.experts.reinit_from,
         "experts.reinit_from", "experts.reinit is 0");
  unless(c.router.method != RouterMethod::kZero, c.router.std != defaults.router.std, "router.std",
         "router.method is zero");
  const bool shared = c.target.shared_expert_intermediate_size > 0;
  unless(c.grow.copies > 0, c.grow.noise != defaults.grow.noise, "grow.noise", "grow.copies is 0");
  unless(shared, c.shared.scale != defaults.shared.scale, "shared.scale", "there is no shared expert");
  unless(shared, c.shared.gate != defaults.shared.gate, "shared.gate", "there is no shared expert");
  unless(c.shared.method != SharedMethod::kZero || !shared, c.shared.scale != defaults.shared.scale,
         "shared.scale", "shared.method zero makes a down projection of zeros");
  return notes;
}

// Of a recipe that grows a mixture: experts and routers are the source's.
void without_effect_on_growth(const UpcycleConfig& c, std::vector<std::string>& notes) {
  const UpcycleConfig defaults;
  const auto& e = c.experts;
  const auto& d = defaults.experts;
  const auto note = [&](bool changed, const char* key) {
    if (changed) notes.push_back(fmt::format("{} has no effect: grow.copies takes experts as they are", key));
  };
  note(e.method != d.method, "experts.method");
  note(e.reinit != d.reinit, "experts.reinit");
  note(e.noise != d.noise, "experts.noise");
  note(e.scale != d.scale, "experts.scale");
  note(c.router.method != defaults.router.method || c.router.std != defaults.router.std, "router");
  note(c.target.layers != defaults.target.layers, "target.layers");
  note(!c.target.family.empty(), "target.family");
  note(!c.keep_rest, "keep_rest");
}

// Rules between keys that need no dense model; those that do are the upcycler's.
void check_together(const UpcycleConfig& c, const Schema& schema, Problems& problems) {
  const auto& t = c.target;
  if (t.num_experts_per_tok > t.num_experts) {
    problems.add(schema.place_of("target.num_experts_per_tok"),
                 fmt::format("{} of {} experts cannot be chosen", t.num_experts_per_tok, t.num_experts));
  }
  const bool shared = t.shared_expert_intermediate_size > 0;
  if (shared && c.shared.method == SharedMethod::kNone) {
    problems.add(schema.place_of("shared.method"),
                 fmt::format("none contradicts target.shared_expert_intermediate_size = {}; make that 0",
                             t.shared_expert_intermediate_size));
  }
  if (!shared && schema.was_given("shared.method") && c.shared.method != SharedMethod::kNone) {
    problems.add(schema.place_of("shared.method"),
                 fmt::format("{} needs target.shared_expert_intermediate_size above 0; use none",
                             name_of(c.shared.method)));
  }
  if (c.router.method == RouterMethod::kVirtualGroup && c.experts.method != ExpertMethod::kVirtualGroup) {
    problems.add(
        schema.place_of("router.method"),
        fmt::format("virtual_group gives the shards of one copy the same row, so experts.method must be "
                    "virtual_group too, not {}",
                    name_of(c.experts.method)));
  }
  if (c.experts.method == ExpertMethod::kRandom) {
    const bool given = schema.was_given("experts.copies") && c.experts.copies.has_value();
    if (given)
      problems.add(schema.place_of("experts.copies"), "experts.method random makes no copies; use auto");
    if (c.experts.reinit > 0) {
      problems.add(schema.place_of("experts.reinit"),
                   "experts.method random draws every neuron already; use 0");
    }
    if (c.experts.noise > 0) {
      problems.add(schema.place_of("experts.noise"),
                   "experts.method random keeps no neuron to add noise to; use 0");
    }
  }
}

}  // namespace

UpcycleConfig parse_upcycle_config(const std::string& yaml, const std::string& where,
                                   const std::vector<std::string>& overrides) {
  UpcycleConfig config;
  config.origin = where;
  Problems problems;
  Schema schema = schema_of(config);
  const YamlNode root = parse_yaml(yaml, where, problems);
  schema.read(root, problems);
  for (const std::string& assignment : overrides) schema.apply_override(assignment, problems);
  if (root.kind == YamlNode::Kind::kMap) schema.check_required(where, problems);
  if (problems.empty()) check_together(config, schema, problems);
  problems.throw_if_any(ExitCode::kUsage, where);
  config.notes = schema.notes();
  for (std::string& note : without_effect(config)) config.notes.push_back(std::move(note));
  if (config.grow.copies > 0) without_effect_on_growth(config, config.notes);
  // So that the resolved recipe says what happens: without a shared expert nothing is made for it.
  if (config.target.shared_expert_intermediate_size == 0) config.shared.method = SharedMethod::kNone;
  return config;
}

UpcycleConfig read_upcycle_config(const std::filesystem::path& file,
                                  const std::vector<std::string>& overrides) {
  return parse_upcycle_config(read_text_file(file), file.string(), overrides);
}

std::string to_yaml(const UpcycleConfig& config) {
  UpcycleConfig copy = config;  // a schema binds to a struct it could also write
  return schema_of(copy).to_yaml();
}

bool asks_for_tokens(const UpcycleConfig& config) {
  return config.router.method == RouterMethod::kPrompts || config.experts.method == ExpertMethod::kCluster;
}

std::string upcycle_config_reference() {
  UpcycleConfig defaults;
  return schema_of(defaults).reference();
}

std::string upcycle_config_help() {
  UpcycleConfig defaults;
  return schema_of(defaults).help();
}

}  // namespace upmoe
