#include "upcycle/recipe.h"

#include <map>
#include <set>

#include "data/hf_model.h"
#include "upcycle/mixture_shape.h"
#include "upcycle/recipe_problems.h"
#include "upcycle/scale.h"

namespace upmoe {
namespace {

bool has_shared(const UpcycleConfig& config) {
  return config.target.shared_expert_intermediate_size > 0;
}

// Of the experts that one dense model makes.
std::int64_t routed_neurons(const UpcycleConfig& config, int sources) {
  return checked_mul(config.target.num_experts / sources, config.target.moe_intermediate_size);
}

// The shared expert is cut from the copies behind the routed ones.
bool shares_pool(const UpcycleConfig& config) {
  return has_shared(config) && config.experts.method == ExpertMethod::kShuffle &&
         config.shared.method == SharedMethod::kShuffle;
}

bool gives_rows(RouterMethod method) {
  return method == RouterMethod::kPrompts || method == RouterMethod::kNeurons;
}

// What the lines of one layer have in common.
struct LayerRecipe {
  const UpcycleConfig& config;
  const ModelConfig& dense;
  int layer;
  double scale;
  int sources;
  std::shared_ptr<const std::vector<std::int32_t>> order;  // of the neurons, where tokens told one

  int experts_of_source() const { return config.target.num_experts / sources; }
  UnitMap routed_units(int expert) const;
  UnitMap shared_units() const;
  Redraw redraw() const {
    return {config.experts.reinit_from == ReinitFrom::kSource,
            config.experts.reinit_stats == ReinitStats::kBlock, dense.initializer_range};
  }
  FreshInit router() const;
};

UnitMap LayerRecipe::routed_units(int expert) const {
  const auto& experts = config.experts;
  const int place = expert % experts_of_source();  // among those of its dense model
  UnitMap map;
  map.source_width = dense.intermediate_size;
  map.width = config.target.moe_intermediate_size;
  map.layer = layer;
  map.name = fmt::format("layers.{}.experts.{}", layer, expert);
  map.joint = experts.reinit_sets == ReinitSets::kJoint;
  map.redrawn = redrawn_units(experts.reinit, map.width);
  if (experts.noise_share < 1) map.noisy = redrawn_units(experts.noise_share, map.width);
  switch (experts.method) {
    case ExpertMethod::kCopy:
      map.rule = UnitMap::Rule::kRange;
      break;
    case ExpertMethod::kSplit:
      map.rule = experts.split == SplitOrder::kRandom ? UnitMap::Rule::kPermuted : UnitMap::Rule::kWrap;
      map.begin = place * map.width;
      break;
    case ExpertMethod::kShuffle:
      map.rule = UnitMap::Rule::kShuffle;
      map.begin = place * map.width;
      break;
    case ExpertMethod::kVirtualGroup:  // expert G*copy + s holds shard s
      map.rule = UnitMap::Rule::kRange;
      map.begin = (place % shards_per_copy(map.source_width, map.width)) * map.width;
      break;
    case ExpertMethod::kCluster:  // behind the shared expert's
      map.rule = UnitMap::Rule::kGiven;
      map.order = order;
      map.begin = map.source_width - routed_neurons(config, sources) + place * map.width;
      break;
    case ExpertMethod::kRandom:
      map.rule = UnitMap::Rule::kNew;
      map.redrawn = 0;  // all are new already
      break;
  }
  return map;
}

UnitMap LayerRecipe::shared_units() const {
  UnitMap map = routed_units(config.target.num_experts);
  map.width = config.target.shared_expert_intermediate_size;
  map.name = fmt::format("layers.{}.shared", layer);
  map.redrawn = 0;
  map.noisy.reset();  // there is no noise
  map.begin = 0;
  switch (config.shared.method) {
    case SharedMethod::kDense:
      map.rule = UnitMap::Rule::kRange;
      break;
    // From the same endless row of copies, behind the routed experts; redrawn likewise.
    case SharedMethod::kShuffle:
      map.rule = UnitMap::Rule::kShuffle;
      map.begin = routed_neurons(config, sources);
      map.redrawn = redrawn_units(config.experts.reinit, map.width);
      break;
    case SharedMethod::kActive:
      map.rule = UnitMap::Rule::kGiven;
      map.order = order;
      break;
    case SharedMethod::kZero:
      map.rule = UnitMap::Rule::kPadding;
      break;
    case SharedMethod::kRandom:
    case SharedMethod::kNone:
      map.rule = UnitMap::Rule::kNew;
      break;
  }
  return map;
}

FreshInit LayerRecipe::router() const {
  FreshInit init;
  init.std = config.router.std;
  switch (config.router.method) {
    case RouterMethod::kNormal:
      break;
    case RouterMethod::kZero:
      init.kind = FreshInit::Kind::kConstant;
      break;
    case RouterMethod::kPrompts:
    case RouterMethod::kNeurons:
      break;  // given
    case RouterMethod::kUniform:
      init.kind = FreshInit::Kind::kUniform;
      break;
    case RouterMethod::kVirtualGroup:  // one row for each copy, the same for its shards
      init.rows_per_draw = shards_per_copy(dense.intermediate_size, config.target.moe_intermediate_size);
      break;
  }
  return init;
}

// One pass over the mixture's parameters and their tensors on disk, a line for each; the role says which kind it is:
//
//   router            FreshInit                    shared gate   FreshInit (a constant 0)
//   expert, shared    ExpertMatrix of dense FFN    the rest      Copy, or FreshInit where the rest is not kept
//
// Whatever a line reads is noted, so that in the end every dense tensor is used or listed as dropped.
class RecipeBuilder {
 public:
  RecipeBuilder(const UpcycleConfig& config, const ModelConfig& dense, int sources,
                const Calibration* calibration)
      : config_(config),
        dense_(dense),
        calibration_(calibration),
        sources_count_(sources),
        moe_(make_moe_config(config, dense)),
        shared_scale_(resolve_shared_scale(config, moe_.shared_expert_gate)) {
    recipe_.seed = static_cast<std::uint64_t>(config.seed);
    recipe_.scale = resolve_scale(config, dense.intermediate_size, moe_.router.score);
    recipe_.redrawn = config.experts.method == ExpertMethod::kRandom
                          ? config.target.moe_intermediate_size
                          : redrawn_units(config.experts.reinit, config.target.moe_intermediate_size);
    recipe_.layers.resize(static_cast<std::size_t>(dense.num_hidden_layers));
    for (int layer = 0; layer < dense.num_hidden_layers; ++layer)
      if (moe_.is_moe_layer(layer))
        recipe_.layers[static_cast<std::size_t>(layer)].experts.resize(
            static_cast<std::size_t>(config.target.num_experts));
    for (const ParamSpec& param : make_param_table(dense)) {
      for (HfTensor& tensor : hf_tensors_of(dense, param))
        sources_.emplace(tensor.name, std::move(tensor.shape));
    }
  }

  Recipe build() {
    for (const ParamSpec& param : make_param_table(moe_)) {
      if (!param.trained) continue;  // a buffer, which no dense model has, begins at zero
      for (const HfTensor& tensor : hf_tensors_of(moe_, param)) add(param, tensor);
    }
    for (const auto& [name, shape] : sources_) {
      if (!used_.contains(name)) recipe_.dropped.push_back(name);
    }
    return std::move(recipe_);
  }

 private:
  void add(const ParamSpec& param, const HfTensor& tensor) {
    if (!made_.insert(tensor.name).second) fail(ExitCode::kFailure, "tensor {} is made twice", tensor.name);
    RecipeLine line{tensor.name, tensor.shape, transform_of(param, tensor)};
    if (const auto* copy = std::get_if<Copy>(&line.transform)) use(copy->from, &tensor.shape);
    if (const auto* expert = std::get_if<ExpertMatrix>(&line.transform)) {
      // Rules behind kShuffle (kNew, kPadding) take no neuron of the source; redrawing after its statistics still reads
      // it.
      const bool reads = expert->redraw.from_source || expert->map.rule <= UnitMap::Rule::kShuffle;
      if (reads) use(expert->from, nullptr);
    }
    recipe_.lines.push_back(std::move(line));
  }

  void use(const std::string& name, const std::vector<std::int64_t>* shape) {
    const auto it = sources_.find(name);
    if (it == sources_.end()) fail(ExitCode::kFailure, "the dense model has no tensor {}", name);
    if (shape != nullptr && it->second != *shape) {
      fail(ExitCode::kFailure, "tensor {} has another shape in the dense model", name);
    }
    used_.insert(name);
  }

  // Attention, norms, embedding and head.
  Transform rest(const ParamSpec& param, const HfTensor& tensor) const {
    if (config_.keep_rest)
      return Copy{tensor_name(dense_, param.role, param.layer, tensor.half),
                  config_.sources.rest == SourcesRest::kAverage ? sources_count_ : 1};
    switch (param.init.kind) {
      case Init::Kind::kOnes:
        return FreshInit{FreshInit::Kind::kConstant, 0.0, 1.0, 1};
      case Init::Kind::kZeros:
        return FreshInit{FreshInit::Kind::kConstant, 0.0, 0.0, 1};
      case Init::Kind::kNormal:
        return FreshInit{FreshInit::Kind::kNormal, param.init.size, 0.0, 1};
      case Init::Kind::kUniform:
        break;  // of adapters, which no recipe makes
    }
    fail(ExitCode::kFailure, "{}: no such initialisation", param.name);
  }

  // Also notes where the line stands among its layer's.
  Transform transform_of(const ParamSpec& param, const HfTensor& tensor) {
    const int line = static_cast<int>(recipe_.lines.size());
    switch (param.role) {
      case Role::kRouter:
        layer_of(param).router = line;
        if (gives_rows(config_.router.method)) return given_router(param, tensor);
        return layer_recipe(param).router();
      case Role::kSharedGate:
        if (!config_.keep_rest) return rest(param, tensor);
        layer_of(param).shared_gate = line;
        return FreshInit{FreshInit::Kind::kConstant, 0.0, 0.0, 1};  // sigmoid 1/2, which shared.scale undoes
      case Role::kExpertGateUp:
      case Role::kExpertDown:
      case Role::kSharedGateUp:
      case Role::kSharedDown:
        return expert_matrix(param, tensor, line);
      default:
        return rest(param, tensor);
    }
  }

  // Shared by all of a layer's lines.
  std::shared_ptr<const std::vector<std::int32_t>> order_of(int layer) const {
    if (calibration_ == nullptr || config_.experts.method != ExpertMethod::kCluster) return nullptr;
    auto& order = orders_[layer];
    if (order == nullptr) {
      order = std::make_shared<const std::vector<std::int32_t>>(
          calibration_->layers.at(static_cast<std::size_t>(layer)).order);
      UPMOE_CHECK(static_cast<std::int64_t>(order->size()) == dense_.intermediate_size,
                  "{} neurons in order of {}", order->size(), dense_.intermediate_size);
    }
    return order;
  }

  GivenRows given_router(const ParamSpec& param, const HfTensor& tensor) const {
    GivenRows rows{nullptr, config_.router.std};
    if (calibration_ == nullptr) return rows;
    const std::vector<float>& values =
        calibration_->layers.at(static_cast<std::size_t>(param.layer)).router_ED;
    UPMOE_CHECK(static_cast<std::int64_t>(values.size()) == tensor.elements(), "{} values for {}",
                values.size(), tensor.name);
    rows.values = std::make_shared<const std::vector<float>>(values);
    return rows;
  }

  ExpertMatrix expert_matrix(const ParamSpec& param, const HfTensor& tensor, int line) {
    const LayerRecipe layer = layer_recipe(param);
    ExpertMatrix m;
    m.matrix = matrix_of(tensor.half);
    m.from = ffn_name(dense_, param.layer, m.matrix);
    m.redraw = layer.redraw();
    const bool routed = param.expert;
    const int expert = static_cast<int>(tensor.expert);
    m.map = routed ? layer.routed_units(expert) : layer.shared_units();
    if (routed) m.source = expert / layer.experts_of_source();
    if (m.map.redrawn == 0) m.redraw.block = false;  // nothing of the source is replaced
    if (routed) m.noise = config_.experts.noise;
    // The down projection is linear, so scaling it scales the expert's output; gate and up are not.
    if (m.matrix == FfnMatrix::kDown) m.scale = routed ? recipe_.scale : shared_scale_;
    Recipe::Layer& index = layer_of(param);
    (routed ? index.experts[static_cast<std::size_t>(expert)]
            : index.shared)[static_cast<std::size_t>(m.matrix)] = line;
    return m;
  }

  LayerRecipe layer_recipe(const ParamSpec& param) const {
    return {config_, dense_, param.layer, recipe_.scale, sources_count_, order_of(param.layer)};
  }
  Recipe::Layer& layer_of(const ParamSpec& param) {
    return recipe_.layers[static_cast<std::size_t>(param.layer)];
  }

  const UpcycleConfig& config_;
  const ModelConfig& dense_;
  const Calibration* calibration_;
  mutable std::map<int, std::shared_ptr<const std::vector<std::int32_t>>> orders_;
  const int sources_count_;
  const ModelConfig moe_;
  const double shared_scale_;
  std::map<std::string, std::vector<std::int64_t>> sources_;  // dense tensors and their shapes
  std::set<std::string> used_, made_;
  Recipe recipe_;
};

}  // namespace

std::int64_t RecipeLine::columns() const {
  std::int64_t n = 1;
  for (std::size_t i = 1; i < shape.size(); ++i) n = checked_mul(n, shape[i]);
  return n;
}

FfnMatrix matrix_of(Half half) {
  switch (half) {
    case Half::kGate:
      return FfnMatrix::kGate;
    case Half::kUp:
      return FfnMatrix::kUp;
    case Half::kWhole:
      return FfnMatrix::kDown;
  }
  fail(ExitCode::kFailure, "no such part of an FFN");
}

std::string ffn_name(const ModelConfig& dense, int layer, FfnMatrix matrix) {
  switch (matrix) {
    case FfnMatrix::kGate:
      return tensor_name(dense, Role::kFfnGateUp, layer, Half::kGate);
    case FfnMatrix::kUp:
      return tensor_name(dense, Role::kFfnGateUp, layer, Half::kUp);
    case FfnMatrix::kDown:
      return tensor_name(dense, Role::kFfnDown, layer);
  }
  fail(ExitCode::kFailure, "no such FFN matrix");
}

UpcycleConfig resolve(const UpcycleConfig& config, const ModelConfig& dense, int sources) {
  UpcycleConfig out = config;
  const auto& t = config.target;
  const ModelConfig moe = make_moe_config(config, dense);
  out.target.family = moe.model_type;
  if (has_shared(config)) {
    out.shared.gate = moe.shared_expert_gate ? SharedGate::kSigmoid : SharedGate::kNone;
    out.shared.scale = resolve_shared_scale(config, moe.shared_expert_gate);
  }
  out.experts.scale = resolve_scale(config, dense.intermediate_size, moe.router.score);
  if (out.experts.copies) return out;
  switch (config.experts.method) {
    case ExpertMethod::kCopy:
      out.experts.copies = t.num_experts / sources;
      break;
    case ExpertMethod::kSplit:
    case ExpertMethod::kShuffle: {
      // How many times the dense neurons have to be gone through to fill all experts, the last time perhaps in part.
      const std::int64_t neurons =
          routed_neurons(config, sources) + (shares_pool(config) ? t.shared_expert_intermediate_size : 0);
      out.experts.copies = static_cast<int>(shards_per_copy(neurons, dense.intermediate_size));
      break;
    }
    case ExpertMethod::kVirtualGroup:
      out.experts.copies = static_cast<int>(
          t.num_experts / sources / shards_per_copy(dense.intermediate_size, t.moe_intermediate_size));
      break;
    case ExpertMethod::kCluster:
      out.experts.copies = 1;
      break;
    case ExpertMethod::kRandom:
      break;
  }
  return out;
}

Recipe make_recipe(const UpcycleConfig& config, const ModelConfig& dense, int sources,
                   const Calibration* calibration) {
  const std::vector<std::string> problems = problems_of(config, dense, sources);
  if (!problems.empty())
    fail(ExitCode::kUsage, "{}: this recipe does not fit the dense model:{}", config.origin,
         listed(problems));
  return RecipeBuilder(config, dense, sources, calibration).build();
}

}  // namespace upmoe
