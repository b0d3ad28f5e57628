#include "trainer/logits_file.h"

#include <algorithm>
#include <utility>

#include "data/folder.h"
#include "data/safetensors.h"

namespace upmoe {

LogitsFile::LogitsFile(const std::filesystem::path& path, const std::vector<std::filesystem::path>& inputs,
                       const Shape& shape)
    : file_(path, inputs), shape_(shape), values_(static_cast<std::size_t>(shape.elements())) {
  require_free_space(file_.target(), values_.size() * sizeof(float) + (std::uint64_t{1} << 20));
}

LmHead::Sink LogitsFile::sink() {
  return [this](std::int64_t row, ConstTensorView logits_CV) {
    std::copy_n(logits_CV.as<float>(), logits_CV.elements(), values_.data() + row * shape_[2]);
  };
}

void LogitsFile::write() {
  write_safetensors(file_, {{"logits", host_view(std::as_const(values_).data(), shape_)}});
}

}  // namespace upmoe
