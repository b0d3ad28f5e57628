#include "upcycle/upcycler.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>

#include "data/companions.h"
#include "data/hf_writer.h"
#include "data/posix_file.h"
#include "data/run_metadata.h"
#include "data/staged_directory.h"
#include "data/store_writer.h"
#include "kernels/core/log.h"
#include "parallel/texts.h"
#include "parallel/threads.h"
#include "upcycle/layer_error.h"
#include "upcycle/mixture_shape.h"
#include "upcycle/output_files.h"
#include "upcycle/progress.h"
#include "upcycle/recipe_table.h"
#include "upcycle/report.h"
#include "upcycle/source_survey.h"
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
  HfLayout layout;
};

Plan make_plan(const UpcycleConfig& config, const DenseSource& source, std::uint64_t max_shard_bytes) {
  const ModelConfig& dense = source.model().config();
  Plan plan;
  plan.recipe = make_recipe(config, dense);  // first: it lists all that does not fit
  plan.config = resolve(config, dense);
  plan.moe = make_moe_config(config, dense);
  plan.moe.dtype = source.dtype() == DType::kBF16 ? "bfloat16" : "float32";
  plan.layout = plan_hf_layout(plan.moe, source.dtype(), max_shard_bytes);
  for (const ParamSpec& p : make_param_table(plan.moe))
    if (!p.trained)
      for (const HfTensor& t : hf_tensors_of(plan.moe, p)) plan.layout.zeros.insert(t.name);
  return plan;
}

// One file is cut without regard to where its tensors end; only the last piece is shorter than the others:
//
//   file     | header | layer 0 ........................ | layer 1 ................... | ... |
//   pieces   |      0      |      1      |      2      |      3      |      4      |   5     |
//
// So all ranks and threads have the same to do, and every write starts at a disk block.
// A stretch of one output file, or the error of one layer, which writes nothing.
struct Piece {
  std::size_t file = 0;
  std::uint64_t begin = 0, end = 0;
  int error_of_layer = -1;
};

// Where the tensors of the recipe lie in the files.
class FileMap {
 public:
  FileMap(const Recipe& recipe, const HfLayout& layout) : recipe_(recipe), layout_(layout) {
    std::map<std::string, const RecipeLine*> lines;
    for (const RecipeLine& line : recipe.lines) lines[line.target] = &line;
    for (const HfLayout::File& file : layout.files) {
      auto& in_file = lines_.emplace_back();
      for (const SafetensorsEntry& entry : file.entries) {
        if (layout.zeros.contains(entry.name)) {
          in_file.push_back(nullptr);
          continue;
        }
        const auto found = lines.find(entry.name);
        UPMOE_CHECK(found != lines.end(), "no recipe line for {}", entry.name);
        in_file.push_back(found->second);
        lines.erase(found);
      }
    }
    UPMOE_CHECK(lines.empty(), "{} has no place in the files", lines.begin()->first);
  }

  // Bytes [piece.begin, piece.end) of a file: of its header and of the tensors that lie there.
  void fill_piece(const Piece& piece, const FillContext& context, std::span<std::byte> out) const {
    const HfLayout::File& file = layout_.files[piece.file];
    const std::uint64_t header = file.header.size();
    if (piece.begin < header) {
      const std::uint64_t bytes = std::min(header, piece.end) - piece.begin;
      std::memcpy(out.data(), file.header.data() + piece.begin, bytes);
    }
    for_each_tensor(piece, [&](std::size_t i, std::uint64_t begin, std::uint64_t end) {
      const std::uint64_t start = header + file.entries[i].begin;
      const std::span<std::byte> part = out.subspan(begin - piece.begin, end - begin);
      if (const RecipeLine* line = lines_[piece.file][i]) {
        fill_bytes(*line, begin - start, end - start, context, part);
      } else {
        std::fill(part.begin(), part.end(), std::byte{0});
      }
    });
  }

  // The layers whose last expert matrix ends in this piece.
  std::set<int> layers_ending_in(const Piece& piece, std::map<int, std::uint64_t>& bytes_left) const {
    std::set<int> layers;
    for_each_tensor(piece, [&](std::size_t i, std::uint64_t begin, std::uint64_t end) {
      const RecipeLine* line = lines_[piece.file][i];
      const auto* m = line == nullptr ? nullptr : std::get_if<ExpertMatrix>(&line->transform);
      if (m != nullptr && (bytes_left[m->map.layer] -= end - begin) == 0) layers.insert(m->map.layer);
    });
    return layers;
  }

  std::map<int, std::uint64_t> expert_bytes_by_layer(DType dtype) const {
    std::map<int, std::uint64_t> bytes;
    for (const RecipeLine& line : recipe_.lines) {
      const auto* m = std::get_if<ExpertMatrix>(&line.transform);
      if (m == nullptr) continue;
      bytes[m->map.layer] += static_cast<std::uint64_t>(line.rows() * line.columns()) * size_of(dtype);
    }
    return bytes;
  }

 private:
  // visit(entry, begin, end) with the part of each tensor inside the piece, in offsets of the file.
  template <class Visit>
  void for_each_tensor(const Piece& piece, const Visit& visit) const {
    const HfLayout::File& file = layout_.files[piece.file];
    const std::uint64_t header = file.header.size();
    auto at = std::partition_point(file.entries.begin(), file.entries.end(),
                                   [&](const SafetensorsEntry& e) { return header + e.end <= piece.begin; });
    for (; at != file.entries.end() && header + at->begin < piece.end; ++at) {
      visit(static_cast<std::size_t>(at - file.entries.begin()), std::max(piece.begin, header + at->begin),
            std::min(piece.end, header + at->end));
    }
  }

  const Recipe& recipe_;
  const HfLayout& layout_;
  std::vector<std::vector<const RecipeLine*>> lines_;  // by file and entry; null: zeros
};

// Everything to be done, in the order of the files; the same list on every rank. A layer's error comes right
// after its last expert matrix, while its dense FFN is still at hand.
std::vector<Piece> make_pieces(const FileMap& map, const HfLayout& layout, DType dtype,
                               std::uint64_t piece_bytes) {
  std::map<int, std::uint64_t> bytes_left = map.expert_bytes_by_layer(dtype);
  std::vector<Piece> pieces;
  for (std::size_t f = 0; f < layout.files.size(); ++f) {
    for (std::uint64_t at = 0; at < layout.files[f].bytes; at += piece_bytes) {
      const Piece piece{f, at, std::min(at + piece_bytes, layout.files[f].bytes), -1};
      pieces.push_back(piece);
      for (const int layer : map.layers_ending_in(piece, bytes_left)) pieces.push_back({0, 0, 0, layer});
    }
  }
  return pieces;
}

// A rank's share: neighbouring pieces, by bytes.
std::vector<Piece> share_of(const std::vector<Piece>& pieces, int rank, int ranks) {
  std::uint64_t total = 0, before = 0;
  for (const Piece& p : pieces) total += p.end - p.begin;
  std::vector<Piece> mine;
  for (const Piece& p : pieces) {
    // Where the piece's middle lies decides; sizes stay far below 2^53.
    // A layer's error has no bytes and goes with the place where it stands, at a border perhaps to the next rank, which
    // then reads that layer's FFN for it.
    const double middle = static_cast<double>(before) + static_cast<double>(p.end - p.begin) / 2;
    const int owner = std::min(ranks - 1, static_cast<int>(middle * ranks / static_cast<double>(total)));
    if (owner == rank) mine.push_back(p);
    before += p.end - p.begin;
  }
  return mine;
}

class Upcycler {
 public:
  Upcycler(const UpcycleConfig& config, const UpcycleOptions& options, Communicator& comm)
      : options_(options), comm_(comm), threads_(options.threads > 0 ? options.threads : rank_threads()) {
    on_rank_0([&] { check_new_directory(options.to, {options.from}); });
    // Rank 0 first, so that what is wrong with the source is told once.
    on_rank_0([&] { source_.emplace(options.from); });
    run_agreed(comm_, [&] {
      if (!source_) source_.emplace(options.from);
    });
    on_rank_0([&] { plan_.emplace(make_plan(config, *source_, options.max_shard_bytes)); });
    run_agreed(comm_, [&] {
      if (!plan_) plan_.emplace(make_plan(config, *source_, options.max_shard_bytes));
    });
    on_rank_0([&] { stage_.emplace(options.to, std::vector<fs::path>{options.from}); });
    find_folder();
  }

  void run() {
    survey_ = survey_source(*source_, comm_, threads_, options_.progress && comm_.rank() == 0);
    if (comm_.rank() == 0)
      for (const std::string& name : survey_.all_zero) log::warning("every value of {} is zero", name);
    if (options_.form == OutputForm::kCheckpoint) {
      write_checkpoint();
    } else {
      write_directory();
    }
  }

 private:
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
    const StoreShare share(plan_->recipe, plan_->moe, source_->dtype(), comm_.rank(), comm_.size(),
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
    return layer_error(plan_->recipe, layer, plan_->moe, context, options_.error_tokens);
  }

  void write_tensors(std::vector<double>& errors) {
    const FileMap map(plan_->recipe, plan_->layout);
    const std::vector<Piece> pieces = share_of(
        make_pieces(map, plan_->layout, source_->dtype(), piece_bytes()), comm_.rank(), comm_.size());
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
      const auto bytes = static_cast<std::size_t>(block.range.size()) * size_of(source_->dtype());
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
        layer_reports(plan_->recipe, errors, source_->model().config(), *permutations_);
    write_text_synced(folder / "config.json", to_hf_json(plan_->moe));
    write_text_synced(folder / "upcycle_report.json",
                      make_report(plan_->config, plan_->recipe, survey_, layers, options_.error_tokens));
    copy_companions(options_.from, folder);
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
        plan_->recipe.seed, static_cast<std::int32_t>(source_->model().config().intermediate_size));
    return {*source_, survey_, *permutations_, plan_->recipe.seed};
  }

  const UpcycleOptions& options_;
  Communicator& comm_;
  int threads_;
  std::optional<StagedDirectory> stage_;  // of rank 0
  fs::path folder_;                       // its path(), on every rank
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
  const std::size_t files = plan.layout.files.size();
  out += options.form == OutputForm::kCheckpoint ? "a checkpoint of one shard per rank"
                                                 : fmt::format("{} file{}", files, files == 1 ? "" : "s");
  out += fmt::format(", {} bytes ({:.1f} GB), {}, {}\n", bytes, static_cast<double>(bytes) / 1e9,
                     plan.moe.dtype, family_of(plan.moe).architecture);
  return out;
}

void upcycle(const UpcycleConfig& config, const UpcycleOptions& options, Communicator& comm) {
  Upcycler(config, options, comm).run();
}

}  // namespace upmoe
