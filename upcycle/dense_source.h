#pragma once
// The dense model as upcycling reads it: raw bytes in the file's element type, one layer's FFN at a time.

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "data/hf_model.h"
#include "upcycle/recipe.h"

namespace upmoe {

// One layer's FFN in the source's element type: gate and up [F, D], down [D, F].
struct SourceFfn {
  std::int64_t width = 0, model_width = 0;
  std::vector<std::byte> gate, up, down;
  const std::byte* data(FfnMatrix matrix) const;
};

// `count` elements of `dtype`, a source's, as fp32.
void to_floats(const std::byte* in, DType dtype, std::int64_t count, float* out);
// Rows [begin, end) of one of its matrices as fp32, the first at `out`, each `stride` elements behind the one before.
void read_rows(const SourceFfn& ffn, FfnMatrix matrix, DType dtype, std::int64_t begin, std::int64_t end,
               std::int64_t stride, float* out);

// What a recipe starts from: a dense model, or a mixture that is to grow.
enum class SourceKind : std::uint8_t { kDense, kMixture };
// Throws Error(kBadInput) where the model that lies at `where` is of the other kind.
void require_kind(const ModelConfig& model, SourceKind kind, const std::string& where);

class DenseSource {
 public:
  // Throws Error(kBadInput) when the directory is no model of this kind whose tensors are all bf16, or all fp32.
  explicit DenseSource(const std::filesystem::path& dir, SourceKind kind = SourceKind::kDense);
  const HfModel& model() const { return model_; }
  DType dtype() const { return dtype_; }
  // Bytes [offset, offset + out.size()) of a tensor.
  void read(const std::string& tensor, std::uint64_t offset, std::span<std::byte> out) const;
  // Of a dense model. Kept for the layers asked for last, so that workers on neighbouring tensors share it. Safe for
  // several threads.
  std::shared_ptr<const SourceFfn> ffn(int layer) const;

 private:
  struct Slot {
    int layer;
    std::once_flag once;
    SourceFfn ffn;
  };
  SourceFfn load(int layer) const;

  HfModel model_;
  DType dtype_;
  mutable std::mutex mutex_;
  mutable std::list<std::shared_ptr<Slot>> slots_;  // newest first
};

}  // namespace upmoe
