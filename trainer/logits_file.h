#pragma once
// The logits of an evaluation as a file.

#include <filesystem>
#include <vector>

#include "data/staged_directory.h"
#include "trainer/model/lm_head.h"

namespace upmoe {

// A safetensors file with one tensor, `logits` [sequences, seq_len, vocab] in fp32, filled chunk by chunk. What keeps
// it from being written is found when it is made, before the model is evaluated.
class LogitsFile {
 public:
  // `inputs`: as in StagedFile.
  LogitsFile(const std::filesystem::path& path, const std::vector<std::filesystem::path>& inputs,
             const Shape& shape);
  LmHead::Sink sink();
  void write();

 private:
  StagedFile file_;
  Shape shape_;
  std::vector<float> values_;
};

}  // namespace upmoe
