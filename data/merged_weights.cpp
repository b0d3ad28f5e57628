#include "data/merged_weights.h"

#include <algorithm>

#include "configs/adapter_params.h"

namespace upmoe {

namespace {

// a [L, K] and b [N, L] of one module and expert.
struct Factors {
  AdaptedPart part;
  std::int64_t rank = 0, inputs = 0;
  std::vector<float> a, b;
};

std::vector<float> factor_of(const ParamSpec& adapter, std::int64_t expert, const ReadTensor& read) {
  Box box = whole(adapter.shape);
  if (adapter.expert) {
    box.offset.dim[0] = expert;
    box.extent.dim[0] = 1;
  }
  std::vector<float> values(static_cast<std::size_t>(box.elements()));
  read(adapter, box, host_view(values.data(), box.extent));
  return values;
}

// Of a row of a weight, which all dims but the last number: whose it is, and where it lies in the matrix [N, K] of its
// expert and half.
struct Row {
  std::int64_t expert = 0, half = 0, output = 0, first_input = 0;
};
Row row_of(const ParamSpec& weight, const Box& box, std::int64_t row) {
  std::array<std::int64_t, 4> index{};
  for (int d = weight.shape.rank - 2; d >= 0; --d) {
    index[static_cast<std::size_t>(d)] = box.offset[d] + row % box.extent[d];
    row /= box.extent[d];
  }
  index[static_cast<std::size_t>(weight.shape.rank) - 1] = box.offset[-1];
  Row r;
  const int inputs = first_input_dim(weight);
  for (int d = 0; d < weight.shape.rank; ++d) {
    const auto i = static_cast<std::size_t>(d);
    if (weight.expert && d == 0) {
      r.expert = index[i];
    } else if (weight.dims[i] == Dim::kPair) {
      r.half = index[i];
    } else {
      std::int64_t& at = d < inputs ? r.output : r.first_input;
      at = at * weight.shape[d] + index[i];
    }
  }
  return r;
}

bool is_of(const AdaptedPart& part, std::int64_t half) {
  return part.half == Half::kWhole || (part.half == Half::kUp) == (half == 1);
}

void add_row(const Factors& f, const Row& at, double scale, std::span<float> row) {
  std::vector<double> sums(row.size());
  for (std::int64_t l = 0; l < f.rank; ++l) {
    const auto b = double(f.b[static_cast<std::size_t>(at.output * f.rank + l)]);
    const float* a = f.a.data() + l * f.inputs + at.first_input;
    for (std::size_t k = 0; k < row.size(); ++k) sums[k] += b * double(a[k]);
  }
  for (std::size_t k = 0; k < row.size(); ++k) row[k] += static_cast<float>(scale * sums[k]);
}

// The adapters beside a weight, of one expert at a time.
class Adapters {
 public:
  Adapters(const ModelConfig& config, const ParamSpec& weight, const ReadTensor& read)
      : specs_(adapter_params(config, weight.role, weight.layer)), read_(read) {}
  bool empty() const { return specs_.empty(); }
  const std::vector<Factors>& of(std::int64_t expert) {
    if (expert_ == expert) return factors_;
    factors_.clear();
    for (std::size_t i = 0; i < specs_.size(); i += 2) {  // an a, its b
      Factors f;
      f.part = specs_[i].adapts->part;
      f.rank = specs_[i + 1].shape[-1];
      f.a = factor_of(specs_[i], expert, read_);
      f.b = factor_of(specs_[i + 1], expert, read_);
      f.inputs = static_cast<std::int64_t>(f.a.size()) / f.rank;
      factors_.push_back(std::move(f));
    }
    expert_ = expert;
    return factors_;
  }

 private:
  std::vector<ParamSpec> specs_;
  const ReadTensor& read_;
  std::int64_t expert_ = -1;
  std::vector<Factors> factors_;
};

}  // namespace

ReadTensor with_adapters_merged(const ModelConfig& config, ReadTensor read) {
  return [config, read = std::move(read)](const ParamSpec& weight, const Box& box, TensorView out) {
    Adapters adapters(config, weight, read);
    if (adapters.empty()) return read(weight, box, out);
    std::vector<float> values(static_cast<std::size_t>(box.elements()));
    read(weight, box, host_view(values.data(), box.extent));
    const std::int64_t width = box.extent[-1], rows = width == 0 ? 0 : box.elements() / width;
    for (std::int64_t row = 0; row < rows; ++row) {
      const Row at = row_of(weight, box, row);
      for (const Factors& f : adapters.of(at.expert))
        if (is_of(f.part, at.half))
          add_row(f, at, config.lora.scale(),
                  std::span(values).subspan(static_cast<std::size_t>(row * width),
                                            static_cast<std::size_t>(width)));
    }
    store_floats(values, out);
  };
}

}  // namespace upmoe
