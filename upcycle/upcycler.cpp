#include "upcycle/upcycler.h"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "upcycle/layer_error.h"
#include "upcycle/progress.h"
#include "upcycle/report.h"
#include "upcycle/source_survey.h"
#include "upcycle/transforms.h"
#include "upcycle/workers.h"
#include "upcycle/write_pipeline.h"

namespace upmoe {
namespace {

struct Plan {
  UpcycleConfig config;  // as resolved
  ModelConfig moe;
  Recipe recipe;
  HfLayout layout;
};

Plan make_plan(const UpcycleConfig& config, const DenseSource& source, std::uint64_t max_shard_bytes) {
  const ModelConfig& dense = source.model().config();
  Plan plan{resolve(config, dense), make_moe_config(config, dense), make_recipe(config, dense), {}};
  plan.moe.dtype = source.dtype() == DType::kBF16 ? "bfloat16" : "float32";
  plan.layout = plan_hf_layout(plan.moe, source.dtype(), max_shard_bytes);
  return plan;
}

// A run of rows of one output tensor; with line < 0, the error of one layer instead, which writes nothing.
struct Piece {
  int line = -1;
  std::int64_t begin = 0, end = 0;  // rows
  std::size_t file = 0;
  std::uint64_t offset = 0, bytes = 0;  // in the file
  int error_of_layer = -1;
};

std::map<std::string, int> lines_by_name(const Recipe& recipe) {
  std::map<std::string, int> lines;
  for (std::size_t i = 0; i < recipe.lines.size(); ++i) lines[recipe.lines[i].target] = static_cast<int>(i);
  return lines;
}

int layer_of(const Recipe& recipe, int line) {
  const auto* m = std::get_if<ExpertMatrix>(&recipe.lines[static_cast<std::size_t>(line)].transform);
  return m == nullptr ? -1 : m->map.layer;
}

// Everything to be done, in the order of the files; the same list on every rank. A layer's error comes right
// after its last expert matrix, while its dense FFN is still at hand.
std::vector<Piece> make_pieces(const Plan& plan, DType dtype, std::uint64_t piece_bytes) {
  std::map<std::string, int> lines = lines_by_name(plan.recipe);
  std::vector<Piece> pieces;
  std::map<int, std::size_t> last_of_layer;
  for (std::size_t f = 0; f < plan.layout.files.size(); ++f) {
    const HfLayout::File& file = plan.layout.files[f];
    for (const SafetensorsEntry& entry : file.entries) {
      const auto found = lines.find(entry.name);
      UPMOE_CHECK(found != lines.end(), "no recipe line for {}", entry.name);
      const int line_index = found->second;
      lines.erase(found);
      const RecipeLine& line = plan.recipe.lines[static_cast<std::size_t>(line_index)];
      const std::uint64_t row_bytes = static_cast<std::uint64_t>(line.columns()) * size_of(dtype);
      UPMOE_CHECK(entry.end - entry.begin == static_cast<std::uint64_t>(line.rows()) * row_bytes, "{}",
                  entry.name);
      const auto rows_at_once = std::max<std::int64_t>(1, static_cast<std::int64_t>(piece_bytes / row_bytes));
      for (std::int64_t r = 0; r < line.rows(); r += rows_at_once) {
        const std::int64_t end = std::min(line.rows(), r + rows_at_once);
        pieces.push_back({line_index, r, end, f,
                          file.header.size() + entry.begin + static_cast<std::uint64_t>(r) * row_bytes,
                          static_cast<std::uint64_t>(end - r) * row_bytes, -1});
      }
      if (const int layer = layer_of(plan.recipe, line_index); layer >= 0)
        last_of_layer[layer] = pieces.size();
    }
  }
  UPMOE_CHECK(lines.empty(), "{} has no place in the files", lines.begin()->first);
  std::vector<Piece> all;
  for (std::size_t i = 0; i <= pieces.size(); ++i) {
    for (const auto& [layer, after] : last_of_layer) {
      if (after == i) {
        all.emplace_back();
        all.back().error_of_layer = layer;
      }
    }
    if (i < pieces.size()) all.push_back(pieces[i]);
  }
  return all;
}

// A rank's share: neighbouring pieces, by bytes.
std::vector<Piece> share_of(const std::vector<Piece>& pieces, int rank, int ranks) {
  std::uint64_t total = 0, before = 0;
  for (const Piece& p : pieces) total += p.bytes;
  std::vector<Piece> mine;
  for (const Piece& p : pieces) {
    // Where the piece's middle lies decides; sizes stay far below 2^53.
    const double middle = static_cast<double>(before) + static_cast<double>(p.bytes) / 2;
    const int owner = std::min(ranks - 1, static_cast<int>(middle * ranks / static_cast<double>(total)));
    if (owner == rank) mine.push_back(p);
    before += p.bytes;
  }
  return mine;
}

class Upcycler {
 public:
  Upcycler(const UpcycleConfig& config, const UpcycleOptions& options, Communicator& comm)
      : options_(options), comm_(comm), threads_(options.threads > 0 ? options.threads : default_threads()) {
    on_rank_0([&] { paths_ = plan_output(options.from, options.to); });
    // Rank 0 first, so that what is wrong with the source is told once.
    on_rank_0([&] { source_.emplace(options.from); });
    run_agreed(comm_, [&] {
      if (!source_) source_.emplace(options.from);
    });
    on_rank_0([&] { plan_.emplace(make_plan(config, *source_, options.max_shard_bytes)); });
    run_agreed(comm_, [&] {
      if (!plan_) plan_.emplace(make_plan(config, *source_, options.max_shard_bytes));
      if (comm_.rank() != 0) paths_ = plan_output(options.from, options.to);
    });
  }

  void run() {
    survey_ = survey_source(*source_, comm_, threads_);
    if (comm_.rank() == 0) {
      for (const std::string& name : survey_.all_zero) {
        fmt::print(stderr, "upmoe: warning: every value of {} is zero\n", name);
      }
    }
    on_rank_0([&] { create_output(paths_, plan_->layout, bytes_needed(), options_.free_space); });
    try {
      std::vector<double> errors(plan_->recipe.layers.size(), 0.0);
      run_agreed(comm_, [&] { write_tensors(errors); });
      // Each layer's error comes from one rank; the others have zero.
      comm_.all_reduce(host_view(errors.data(), {static_cast<std::int64_t>(errors.size())}), ReduceOp::kSum);
      on_rank_0([&] { finish(errors); });
    } catch (...) {
      if (comm_.rank() == 0) discard_output(paths_);
      throw;
    }
  }

 private:
  template <class Body>
  void on_rank_0(const Body& body) {
    run_agreed(comm_, [&] {
      if (comm_.rank() == 0) body();
    });
  }

  std::uint64_t bytes_needed() const {
    std::uint64_t bytes = (4u << 20) + plan_->layout.index_json.size();  // configuration, report, directory
    for (const HfLayout::File& file : plan_->layout.files) bytes += file.bytes;
    for (const std::string& name : companion_files()) {
      std::error_code absent;
      const std::uint64_t size = std::filesystem::file_size(options_.from / name, absent);
      if (!absent) bytes += size;
    }
    return bytes;
  }

  void write_tensors(std::vector<double>& errors) {
    const std::vector<Piece> pieces =
        share_of(make_pieces(*plan_, source_->dtype(), options_.piece_bytes), comm_.rank(), comm_.size());
    std::uint64_t bytes = 0;
    for (const Piece& p : pieces) bytes += p.bytes;
    Progress progress("upcycling", bytes, options_.progress && comm_.rank() == 0);
    OutputFiles files(paths_.tmp, plan_->layout);
    const FillContext context = fill_context();
    PipelineStages stages;
    stages.make = [&](std::size_t i, std::vector<std::byte>& buffer) {
      const Piece& p = pieces[i];
      buffer.resize(p.bytes);
      if (p.error_of_layer >= 0) {
        errors[static_cast<std::size_t>(p.error_of_layer)] =
            layer_error(plan_->recipe, p.error_of_layer, plan_->moe, context, options_.error_tokens);
      } else {
        fill(plan_->recipe.lines[static_cast<std::size_t>(p.line)], p.begin, p.end, context, buffer);
      }
    };
    stages.write = [&](std::size_t i, std::span<const std::byte> data) {
      files.write(pieces[i].file, pieces[i].offset, data);
      progress.add(data.size());
    };
    run_pipeline(pieces.size(), threads_, stages);
    files.sync();
    progress.finish();
  }

  void finish(const std::vector<double>& errors) {
    const ModelConfig& dense = source_->model().config();
    std::vector<LayerReport> layers;
    for (std::size_t i = 0; i < errors.size(); ++i) {
      layers.push_back({errors[i], count_copies(plan_->recipe, static_cast<int>(i), dense, *permutations_)});
    }
    write_synced(paths_.tmp / "config.json", to_hf_json(plan_->moe));
    if (!plan_->layout.index_json.empty()) {
      write_synced(paths_.tmp / "model.safetensors.index.json", plan_->layout.index_json);
    }
    write_synced(paths_.tmp / "upcycle_report.json",
                 make_report(plan_->config, plan_->recipe, survey_, layers, options_.error_tokens));
    copy_companions(options_.from, paths_.tmp);
    commit_output(paths_, plan_->layout);
  }

  FillContext fill_context() {
    permutations_ = std::make_unique<PermutationCache>(
        plan_->recipe.seed, static_cast<std::int32_t>(source_->model().config().intermediate_size));
    return {*source_, survey_, *permutations_, plan_->recipe.seed};
  }

  const UpcycleOptions& options_;
  Communicator& comm_;
  int threads_;
  OutputPaths paths_;
  std::optional<DenseSource> source_;
  std::optional<Plan> plan_;
  SourceSurvey survey_;
  std::unique_ptr<PermutationCache> permutations_;
};

}  // namespace

std::string plan_upcycle(const UpcycleConfig& config, const UpcycleOptions& options) {
  const DenseSource source(options.from);
  const Plan plan = make_plan(config, source, options.max_shard_bytes);
  std::string out = describe(plan.recipe);
  std::uint64_t bytes = 0;
  for (const HfLayout::File& file : plan.layout.files) bytes += file.bytes;
  out += fmt::format("routed experts: down projections x {}, {} of {} neurons drawn anew\n",
                     plan.recipe.scale, plan.recipe.redrawn, plan.moe.moe_intermediate_size);
  out += fmt::format("{} file{}, {} bytes ({:.1f} GB), {}\n", plan.layout.files.size(),
                     plan.layout.files.size() == 1 ? "" : "s", bytes, static_cast<double>(bytes) / 1e9,
                     plan.moe.dtype);
  return out;
}

void upcycle(const UpcycleConfig& config, const UpcycleOptions& options, Communicator& comm) {
  Upcycler(config, options, comm).run();
}

}  // namespace upmoe
