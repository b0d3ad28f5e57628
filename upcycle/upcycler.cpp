#include "upcycle/upcycler.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "data/companions.h"
#include "data/hf_writer.h"
#include "data/model_source.h"
#include "data/posix_file.h"
#include "data/run_metadata.h"
#include "data/staged_directory.h"
#include "data/store_writer.h"
#include "kernels/core/log.h"
#include "parallel/texts.h"
#include "parallel/threads.h"
#include "upcycle/file_map.h"
#include "upcycle/growth.h"
#include "upcycle/layer_error.h"
#include "upcycle/mixture_shape.h"
#include "upcycle/output_files.h"
#include "upcycle/progress.h"
#include "upcycle/recipe_table.h"
#include "upcycle/report.h"
#include "upcycle/source_set.h"
#include "upcycle/store_share.h"
#include "upcycle/transforms.h"
#include "upcycle/workers.h"
#include "upcycle/write_pipeline.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

struct Plan {
  UpcycleConfig config;  // as resolved
  ModelConfig moe;
  Recipe recipe;
  std::optional<Recipe> origin;  // of a mixture that grows: as it is
  HfLayout layout;
};

std::vector<fs::path> directories_of(const UpcycleOptions& options) {
  std::vector<fs::path> all{options.from};
  all.insert(all.end(), options.more_from.begin(), options.more_from.end());
  return all;
}

SourceKind kind_of(const UpcycleConfig& config) {
  return config.grow.copies > 0 ? SourceKind::kMixture : SourceKind::kDense;
}

// What a plan asks of the models that a recipe starts from.
struct StartingModel {
  ModelConfig model;
  DType dtype;
  int count;  // of one shape
};

StartingModel starting_model(const SourceSet& sources) {
  return {sources.first().model().config(), sources.first().dtype(), sources.size()};
}

// Of a configuration whose weights need not be there.
StartingModel starting_model(const fs::path& file, const UpcycleConfig& config) {
  const ModelConfig model = read_model_config(file);
  require_kind(model, kind_of(config), file.string());
  const std::optional<DType> dtype = dtype_of(model.dtype);
  if (!dtype)
    fail(ExitCode::kBadInput,
         "{}: its weights would be {}; upcycling copies bit for bit and needs all of them in bfloat16, or "
         "all in float32",
         file.string(), name_of(model.dtype));
  return {model, *dtype, 1};
}

Plan make_plan(const UpcycleConfig& config, const StartingModel& source, std::uint64_t max_shard_bytes,
               const Calibration* calibration = nullptr) {
  const ModelConfig& dense = source.model;
  Plan plan;
  if (config.grow.copies > 0) {
    if (source.count > 1)
      fail(ExitCode::kUsage, "{}: grow.copies makes a larger mixture of one, and --from is given {} times",
           config.origin, source.count);
    plan.recipe = make_growth(config, dense);  // first: it lists all that does not fit
    plan.origin = copy_of_mixture(dense);
    plan.config = config;
    plan.config.target.family = dense.model_type;
    plan.moe = grown_config(config, dense);
  } else {
    // First: it lists all that does not fit.
    plan.recipe = make_recipe(config, dense, source.count, calibration);
    plan.config = resolve(config, dense, source.count);
    plan.moe = make_moe_config(config, dense);
  }
  plan.moe.dtype = file_dtype_of(source.dtype);
  plan.layout = plan_hf_layout(plan.moe, source.dtype, max_shard_bytes);
  for (const ParamSpec& p : make_param_table(plan.moe))
    if (!p.trained)
      for (const HfTensor& t : hf_tensors_of(plan.moe, p)) plan.layout.zeros.insert(t.name);
  return plan;
}

class Upcycler {
 public:
  Upcycler(const UpcycleConfig& config, const UpcycleOptions& options, Communicator& comm)
      : options_(options), comm_(comm), threads_(options.threads > 0 ? options.threads : rank_threads()) {
    const std::vector<fs::path> inputs = directories_of(options);
    require_equal(comm_, "recipes", to_yaml(config));
    on_rank_0([&] { check_new_directory(options.to, inputs); });
    // Rank 0 first, so that what is wrong with the source is told once.
    on_rank_0([&] { sources_.emplace(inputs, kind_of(config)); });
    run_agreed(comm_, [&] {
      if (!sources_) sources_.emplace(inputs, kind_of(config));
    });
    require_same_models(inputs);
    const std::optional<Calibration> calibration = calibrated(config);
    const Calibration* given = calibration ? &*calibration : nullptr;
    on_rank_0(
        [&] { plan_.emplace(make_plan(config, starting_model(*sources_), options.max_shard_bytes, given)); });
    run_agreed(comm_, [&] {
      if (!plan_) plan_.emplace(make_plan(config, starting_model(*sources_), options.max_shard_bytes, given));
    });
    on_rank_0([&] { stage_.emplace(options.to, inputs); });
    find_folder();
  }

  void run() {
    sources_->survey(comm_, threads_, options_.progress && comm_.rank() == 0);
    if (comm_.rank() == 0)
      for (int i = 0; i < sources_->size(); ++i)
        for (const std::string& name : sources_->survey_of(i).all_zero)
          log::warning("{}: every value of {} is zero", sources_->at(i).model().dir().string(), name);
    if (options_.form == OutputForm::kCheckpoint) {
      write_checkpoint();
    } else {
      write_directory();
    }
  }

 private:
  // Every rank reads them itself, and makes its part of the mixture: if each host had a folder of its own of that name,
  // with another model in it, the mixture would be of several.
  void require_same_models(const std::vector<fs::path>& inputs) {
    if (comm_.size() == 1) return;
    std::string digests;
    run_agreed(comm_, [&] {
      for (const fs::path& input : inputs) digests += digest_of(*open_model(input)) + "\n";
    });
    require_equal(comm_, "models in --from", digests);
  }

  // What rank 0 found in tokens, on every rank; nothing where the recipe does not ask.
  std::optional<Calibration> calibrated(const UpcycleConfig& config) {
    if (!asks_for_tokens(config)) return std::nullopt;
    std::string bytes;
    on_rank_0([&] {
      if (!options_.calibrate)
        fail(ExitCode::kUsage, "{}: the recipe asks tokens; give them with {}", config.origin,
             config.experts.method == ExpertMethod::kCluster ? "--calibrate" : "--prompts");
      make_recipe(config, sources_->first().model().config(),
                  sources_->size());  // what does not fit is told first
      bytes = to_bytes(options_.calibrate());
    });
    return calibration_from(broadcast_text(comm_, bytes, 0));
  }

  // Where rank 0 prepares the output, known and seen by every rank.
  void find_folder() {
    folder_ = broadcast_text(comm_, stage_ ? stage_->path().string() : "", 0);
    run_agreed(comm_, [&] {
      if (!fs::is_directory(folder_.parent_path()))
        fail(ExitCode::kBadInput,
             "{}: rank {} does not see this folder, which rank 0 made; --to must lie on a file system "
             "that all hosts share",
             folder_.parent_path().string(), comm_.rank());
    });
  }

  void write_directory() {
    on_rank_0([&] {
      require_free_space(stage_->target(), bytes_needed(), options_.free_space);
      stage_->create();
      make_output_files(folder_, plan_->layout);
    });
    std::vector<double> errors(plan_->recipe.layers.size(), 0.0);
    run_agreed(comm_, [&] { write_tensors(errors); });
    add_up(errors);
    on_rank_0([&] { finish(errors); });
  }

  void write_checkpoint() {
    const StoreShare share(plan_->recipe, plan_->moe, sources_->first().dtype(), comm_.rank(), comm_.size(),
                           piece_bytes());
    on_rank_0([&] {
      require_free_space(stage_->target(), StoreWriter::space_for(bytes_needed()), options_.free_space);
      stage_->create();
    });
    StoreWriter writer = StoreWriter::in(folder_, comm_);
    std::vector<double> errors(plan_->recipe.layers.size(), 0.0);
    writer.write(share.pieces(), [&](const PutBlock& put) { write_share(share, put, errors); });
    add_up(errors);
    writer.commit(comm_, checkpoint_metadata(), [&](const fs::path& folder) { add_files(folder, errors); });
    on_rank_0([&] { stage_->commit(); });
  }

  template <class Body>
  void on_rank_0(const Body& body) {
    run_agreed(comm_, [&] {
      if (comm_.rank() == 0) body();
    });
  }

  std::uint64_t bytes_needed() const {
    std::uint64_t bytes = (4u << 20) + plan_->layout.index_json.size();  // configuration, report, directory
    for (const HfLayout::File& file : plan_->layout.files) bytes += file.bytes;
    bytes += companion_bytes(options_.from);
    return bytes;
  }

  // Whole disk blocks.
  std::uint64_t piece_bytes() const {
    return std::max<std::uint64_t>(1, options_.piece_bytes / kDiskBlock) * kDiskBlock;
  }

  // Each layer's error comes from one rank; the others have zero.
  void add_up(std::vector<double>& errors) {
    comm_.all_reduce(host_view(errors.data(), {static_cast<std::int64_t>(errors.size())}), ReduceOp::kSum);
  }

  double error_of(int layer, const FillContext& context) const {
    if (plan_->origin)
      return growth_error(plan_->recipe, *plan_->origin, layer, plan_->moe, context, options_.error_tokens);
    return layer_error(plan_->recipe, layer, plan_->moe, context, options_.error_tokens);
  }

  void write_tensors(std::vector<double>& errors) {
    const FileMap map(plan_->recipe, plan_->layout);
    const std::vector<Piece> pieces =
        share_of(map.pieces(sources_->first().dtype(), piece_bytes()), comm_.rank(), comm_.size());
    std::uint64_t bytes = 0;
    for (const Piece& p : pieces) bytes += p.end - p.begin;
    Progress progress("upcycling", bytes, options_.progress && comm_.rank() == 0);
    OutputFiles files(folder_, plan_->layout);
    const FillContext context = fill_context();
    PipelineStages stages;
    stages.make = [&](std::size_t i, std::span<std::byte> buffer) {
      const Piece& p = pieces[i];
      if (p.error_of_layer >= 0) {
        errors[static_cast<std::size_t>(p.error_of_layer)] = error_of(p.error_of_layer, context);
      } else {
        map.fill_piece(p, context, buffer);
      }
      return p.end - p.begin;
    };
    stages.write = [&](std::size_t i, std::span<const std::byte> data) {
      files.write(pieces[i].file, pieces[i].begin, data);
      progress.add(data.size());
    };
    run_pipeline(pieces.size(), threads_, piece_bytes(), stages);
    files.sync();
    progress.finish();
  }

  void write_share(const StoreShare& share, const PutBlock& put, std::vector<double>& errors) {
    const std::vector<StoreShare::Task>& tasks = share.tasks();
    Progress progress("upcycling", share.bytes(), options_.progress && comm_.rank() == 0);
    const FillContext context = fill_context();
    PipelineStages stages;
    stages.make = [&](std::size_t i, std::span<std::byte> buffer) {
      const auto& [block, layer] = tasks[i];
      const auto bytes = static_cast<std::size_t>(block.range.size()) * size_of(sources_->first().dtype());
      if (layer >= 0) {
        errors[static_cast<std::size_t>(layer)] = error_of(layer, context);
      } else {
        share.fill(block, context, buffer.first(bytes));
      }
      return bytes;
    };
    stages.write = [&](std::size_t i, std::span<const std::byte> data) {
      put(tasks[i].block, data);
      progress.add(data.size());
    };
    run_pipeline(tasks.size(), threads_, piece_bytes(), stages);
    progress.finish();
    if (options_.progress && comm_.rank() == 0) log::info("reading back what was written");
  }

  // What lies beside the tensors in both forms.
  void add_files(const fs::path& folder, const std::vector<double>& errors) {
    const std::vector<LayerReport> layers =
        layer_reports(plan_->recipe, errors, sources_->first().model().config(), *permutations_);
    write_text_synced(folder / "config.json", to_hf_json(plan_->moe));
    copy_companions(options_.from, folder);
    std::optional<StepZero> step_zero;
    if (options_.check) step_zero = options_.check(folder);
    write_text_synced(folder / "upcycle_report.json", make_report(plan_->config, plan_->recipe, *sources_,
                                                                  layers, options_.error_tokens, step_zero));
    if (const double worst = largest_error(layers); worst > kErrorOfNothing)
      log::warning(
          "errors of layers up to {:.3g}: above 1 a layer begins further from what it "
          "was made of than a layer of zeros would; this recipe counts on training",
          worst);
  }

  void finish(const std::vector<double>& errors) {
    if (!plan_->layout.index_json.empty()) {
      write_text_synced(folder_ / "model.safetensors.index.json", plan_->layout.index_json);
    }
    add_files(folder_, errors);
    check_output_files(folder_, plan_->layout);
    stage_->commit();
  }

  // A training run that finished no step and has seen no data: an order of data is what its next run makes.
  std::string checkpoint_metadata() const {
    RunMetadata run;
    run.model_config = to_hf_json(plan_->moe);
    run.source = fs::absolute(options_.from).string();
    return run_metadata_json(run);
  }

  FillContext fill_context() {
    permutations_ = std::make_unique<PermutationCache>(
        plan_->recipe.seed, static_cast<std::int32_t>(sources_->first().model().config().intermediate_size));
    return {sources_->first(), sources_->survey_of(0), *permutations_, plan_->recipe.seed,
            sources_->further()};
  }

  const UpcycleOptions& options_;
  Communicator& comm_;
  int threads_;
  std::optional<StagedDirectory> stage_;  // of rank 0
  fs::path folder_;                       // its path(), on every rank
  std::optional<SourceSet> sources_;
  std::optional<Plan> plan_;
  std::unique_ptr<PermutationCache> permutations_;
};

}  // namespace

UpcyclePlan plan_upcycle(const UpcycleConfig& config, const UpcycleOptions& options) {
  const bool described =
      options.only_planned && options.more_from.empty() && fs::is_regular_file(options.from);
  const StartingModel start = described ? starting_model(options.from, config)
                                        : starting_model(SourceSet(directories_of(options), kind_of(config)));
  const Plan plan = make_plan(config, start, options.max_shard_bytes);
  std::string out = describe(plan.recipe);
  if (start.count > 1)
    out += fmt::format(
        "{} dense models: of {} experts each {} in turn; the rest {}\n", start.count, plan.moe.num_experts,
        plan.moe.num_experts / start.count,
        plan.config.sources.rest == SourcesRest::kAverage ? "is their average" : "from the first");
  std::uint64_t bytes = 0;
  for (const HfLayout::File& file : plan.layout.files) bytes += file.bytes;
  out += fmt::format("routed experts: down projections x {}, {} of {} neurons drawn anew\n",
                     plan.recipe.scale, plan.recipe.redrawn, plan.moe.moe_intermediate_size);
  const std::size_t files = plan.layout.files.size();
  out += options.form == OutputForm::kCheckpoint ? "a checkpoint of one shard per rank"
                                                 : fmt::format("{} file{}", files, files == 1 ? "" : "s");
  out += fmt::format(", {} bytes ({:.1f} GB), {}, {}\n", bytes, static_cast<double>(bytes) / 1e9,
                     name_of(plan.moe.dtype), family_of(plan.moe).architecture);
  const nlohmann::ordered_json json{{"recipe", to_yaml(plan.config)},
                                    {"scale", plan.recipe.scale},
                                    {"redrawn_neurons_per_expert", plan.recipe.redrawn},
                                    {"asks_for_tokens", asks_for_tokens(plan.config)},
                                    {"bytes", bytes},
                                    {"config", nlohmann::ordered_json::parse(to_hf_json(plan.moe))}};
  return {out, json.dump(2) + "\n"};
}

void upcycle(const UpcycleConfig& config, const UpcycleOptions& options, Communicator& comm) {
  Upcycler(config, options, comm).run();
}

}  // namespace upmoe
