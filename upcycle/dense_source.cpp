#include "upcycle/dense_source.h"

#include <algorithm>
#include <map>
#include <utility>

#include "configs/model_folder.h"
#include "data/checkpoint_folder.h"
#include "data/model_source.h"
#include "kernels/core/bf16.h"

namespace upmoe {
namespace {

constexpr std::size_t kLayersKept = 2;  // neighbouring tensors belong to at most two layers

const std::filesystem::path& checked_directory(const std::filesystem::path& dir) {
  namespace fs = std::filesystem;
  if (fs::exists(dir / "manifest.json") || is_run_directory(dir)) {
    fail(
        ExitCode::kBadInput,
        "{}: a checkpoint; upcycling reads model directories, and `upmoe export {} --to DIR` makes one of it",
        dir.string(), dir.string());
  }
  if (!fs::exists(dir / "config.json")) {
    fail(ExitCode::kBadInput, "{}: {}{}", dir.string(),
         fs::exists(dir) ? "no model directory, it holds no config.json" : "does not exist",
         model_folder_hint(dir));
  }
  return dir;
}

// The one element type of the tensors that are used; checks as well which kind of model it is.
DType element_type_of(const HfModel& model, SourceKind kind) {
  const std::string dir = model.dir().string();
  require_kind(model.config(), kind, dir);
  std::map<std::string, std::pair<int, std::string>> kinds;  // dtype -> how many, one of them
  for (const SafetensorsEntry* entry : model.tensors()) {
    if (!model.uses(entry->name)) continue;
    auto& [count, example] = kinds[entry->dtype];
    if (count++ == 0) example = entry->name;
  }
  if (kinds.size() == 1 && kinds.contains("BF16")) return DType::kBF16;
  if (kinds.size() == 1 && kinds.contains("F32")) return DType::kF32;
  std::string found;
  for (const auto& [dtype, tensors] : kinds)
    found += fmt::format("{}{} {} ({}{})", found.empty() ? "" : ", ", tensors.first, dtype, tensors.second,
                         tensors.first > 1 ? ", ..." : "");
  fail(ExitCode::kBadInput,
       "{}: the tensors are {}; upcycling copies bit for bit and needs all of them in BF16, or all in F32. "
       "Convert first: `upmoe export {} --to CONVERTED --dtype fp32` keeps every value, --dtype bf16 "
       "rounds to half the size; then upcycle --from CONVERTED",
       dir, found, dir);
}

}  // namespace

void require_kind(const ModelConfig& model, SourceKind kind, const std::string& where) {
  if (kind == SourceKind::kDense && model.num_experts > 0) {
    fail(
        ExitCode::kBadInput,
        "{}: the model is a mixture of {} experts already; upcycling starts from a dense model, and a recipe "
        "with grow.copies from a mixture",
        where, model.num_experts);
  }
  if (kind == SourceKind::kMixture && model.num_experts == 0)
    fail(ExitCode::kBadInput, "{}: the model is dense; a recipe with grow.copies starts from a mixture",
         where);
}

const std::byte* SourceFfn::data(FfnMatrix matrix) const {
  switch (matrix) {
    case FfnMatrix::kGate:
      return gate.data();
    case FfnMatrix::kUp:
      return up.data();
    case FfnMatrix::kDown:
      return down.data();
  }
  fail(ExitCode::kFailure, "no such FFN matrix");
}

void to_floats(const std::byte* in, DType dtype, std::int64_t count, float* out) {
  if (dtype == DType::kBF16) {
    std::transform(reinterpret_cast<const bf16*>(in), reinterpret_cast<const bf16*>(in) + count, out,
                   [](bf16 v) { return to_float(v); });
  } else {
    std::copy_n(reinterpret_cast<const float*>(in), count, out);
  }
}

void read_rows(const SourceFfn& ffn, FfnMatrix matrix, DType dtype, std::int64_t begin, std::int64_t end,
               std::int64_t stride, float* out) {
  const std::int64_t columns = matrix == FfnMatrix::kDown ? ffn.width : ffn.model_width;
  for (std::int64_t r = begin; r < end; ++r)
    to_floats(ffn.data(matrix) + static_cast<std::size_t>(r * columns) * size_of(dtype), dtype, columns,
              out + (r - begin) * stride);
}

DenseSource::DenseSource(const std::filesystem::path& dir, SourceKind kind)
    : model_(checked_directory(dir)), dtype_(element_type_of(model_, kind)) {}

void DenseSource::read(const std::string& tensor, std::uint64_t offset, std::span<std::byte> out) const {
  const auto [file, entry] = model_.locate(tensor);
  file->read(*entry, offset, out);
}

// A cache of the two layers used last. Who comes first reads, the others of that layer wait for it alone; a layer that
// falls out lives on as long as somebody fills from it.
std::shared_ptr<const SourceFfn> DenseSource::ffn(int layer) const {
  std::shared_ptr<Slot> slot;
  {
    const std::lock_guard lock(mutex_);
    for (auto it = slots_.begin(); it != slots_.end() && slot == nullptr; ++it) {
      if ((*it)->layer == layer) slot = *it;
    }
    if (slot == nullptr) {
      slot = std::make_shared<Slot>();
      slot->layer = layer;
    }
    slots_.remove(slot);
    slots_.push_front(slot);
    if (slots_.size() > kLayersKept) slots_.pop_back();
  }
  std::call_once(slot->once, [&] { slot->ffn = load(layer); });  // outside the lock: other layers go on
  // Points at the FFN and owns the slot around it.
  return {slot, &slot->ffn};
}

SourceFfn DenseSource::load(int layer) const {
  const ModelConfig& config = model_.config();
  SourceFfn ffn;
  ffn.width = config.intermediate_size;
  ffn.model_width = config.hidden_size;
  const auto elements = checked_mul(ffn.width, ffn.model_width);
  const auto bytes =
      static_cast<std::size_t>(checked_mul(elements, static_cast<std::int64_t>(size_of(dtype_))));
  for (const auto& [matrix, data] :
       {std::pair{FfnMatrix::kGate, &ffn.gate}, {FfnMatrix::kUp, &ffn.up}, {FfnMatrix::kDown, &ffn.down}}) {
    data->resize(bytes);
    read(ffn_name(config, layer, matrix), 0, *data);
  }
  return ffn;
}

}  // namespace upmoe
