#include "data/finite_values.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace upmoe {

namespace {

constexpr std::int64_t kAtOnce = std::int64_t{1} << 22;  // values

// Slice by slice of the first dimension: an expert parameter may not fit into memory.
void require_finite(const std::filesystem::path& folder, const std::string& name, const Box& box,
                    const std::function<void(const Box&, TensorView)>& read) {
  std::int64_t bad = 0;
  Box slice = box;
  slice.extent.dim[0] = 1;
  const std::int64_t rows = std::max<std::int64_t>(1, kAtOnce / std::max<std::int64_t>(1, slice.elements()));
  const std::int64_t end = box.offset[0] + box.extent[0];
  std::vector<float> values;
  for (; slice.offset[0] < end; slice.offset.dim[0] += slice.extent[0]) {
    slice.extent.dim[0] = std::min(rows, end - slice.offset[0]);
    values.resize(static_cast<std::size_t>(slice.extent.elements()));
    read(slice, host_view(values.data(), slice.extent));
    bad += std::count_if(values.begin(), values.end(), [](float v) { return !std::isfinite(v); });
  }
  if (bad > 0)
    fail(ExitCode::kBadInput, "{}: tensor '{}' holds {} values that are not finite", folder.string(), name,
         bad);
}

}  // namespace

ReadTensor finite_alone(ReadTensor read, const std::filesystem::path& folder) {
  return [read = std::move(read), folder](const ParamSpec& param, const Box& part, TensorView out) {
    read(param, part, out);
    with_float_type(out.dtype, [&](auto type) {
      const auto* values = out.as<decltype(type)>();
      const auto bad =
          std::count_if(values, values + out.elements(), [](auto v) { return !std::isfinite(to_float(v)); });
      if (bad > 0)
        fail(ExitCode::kBadInput, "{}: parameter '{}' holds {} values that are not finite", folder.string(),
             param.name, bad);
    });
  };
}

void require_finite(const HfModel& model) {
  for (const ParamSpec& p : make_param_table(model.config()))
    for (const HfTensor& t : hf_tensors_of(model.config(), p))
      require_finite(model.dir(), t.name, t.part,
                     [&](const Box& box, TensorView out) { model.read(p, box, out); });
}

void require_finite(const ShardStore& store) {
  for (const auto& [key, t] : store.tensors())
    if (key.second == "weight")
      require_finite(store.dir(), key.first, whole(t.shape),
                     [&](const Box& box, TensorView out) { store.read(key.first, key.second, box, out); });
}

}  // namespace upmoe
