#include "upcycle/dense_source.h"

namespace upmoe {
namespace {

constexpr std::size_t kLayersKept = 2;  // neighbouring tensors belong to at most two layers

// The one element type of all tensors; checks as well that the model is dense.
DType element_type_of(const HfModel& model) {
  const std::string dir = model.dir().string();
  if (model.config().num_experts > 0) {
    fail(ExitCode::kBadInput,
         "{}: the model is a mixture of {} experts already; upcycling starts from a dense model", dir,
         model.config().num_experts);
  }
  const SafetensorsEntry* first = nullptr;
  for (const SafetensorsEntry* entry : model.tensors()) {
    if (first == nullptr) first = entry;
    if (entry->dtype != first->dtype) {
      fail(ExitCode::kBadInput,
           "{}: tensor {} is {}, tensor {} is {}; all tensors must have one element type", dir, first->name,
           first->dtype, entry->name, entry->dtype);
    }
  }
  if (first == nullptr) fail(ExitCode::kBadInput, "{}: the model has no tensors", dir);
  if (first->dtype == "BF16") return DType::kBF16;
  if (first->dtype == "F32") return DType::kF32;
  fail(ExitCode::kBadInput,
       "{}: tensors are {}; upcycling copies bit for bit and reads BF16 and F32, convert first", dir,
       first->dtype);
}

}  // namespace

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

DenseSource::DenseSource(const std::filesystem::path& dir) : model_(dir), dtype_(element_type_of(model_)) {}

void DenseSource::read(const std::string& tensor, std::uint64_t offset, std::span<std::byte> out) const {
  const auto [file, entry] = model_.locate(tensor);
  file->read(*entry, offset, out);
}

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
  const FfnNames names = ffn_names(layer);
  for (const auto& [name, data] : {std::pair{&names.gate, &ffn.gate}, std::pair{&names.up, &ffn.up},
                                   std::pair{&names.down, &ffn.down}}) {
    data->resize(bytes);
    read(*name, 0, *data);
  }
  return ffn;
}

}  // namespace upmoe
