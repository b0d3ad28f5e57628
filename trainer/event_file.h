#pragma once
// TensorBoard event files: TFRecord framing with masked CRC-32C, and the few protobuf fields that scalars need.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "trainer/appended_file.h"

namespace upmoe {

class EventFile {
 public:
  // Opens a new file in `dir` (after a crash or a resume always a new one: nothing may stand behind a torn record).
  // What earlier files there say of `first_step` and later ones is taken back.
  EventFile(const std::filesystem::path& dir, std::int64_t first_step);
  // One event; flushed. A failing disk is reported once by a warning and does not stop training.
  void scalars(std::int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  void record(const std::string& payload);
  std::optional<AppendedFile> file_;
};

}  // namespace upmoe
