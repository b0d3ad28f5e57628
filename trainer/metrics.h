#pragma once
// metrics.jsonl, TensorBoard events and the console line of a run. Rank 0 only.

#include <filesystem>
#include <memory>
#include <optional>

#include "trainer/appended_file.h"
#include "trainer/event_file.h"
#include "trainer/held_out.h"
#include "trainer/peak.h"
#include "trainer/trainer.h"

namespace upmoe {

class Metrics {
 public:
  // Lines beyond `from_step` of an earlier attempt, all of them where that is 0, are moved to metrics.jsonl.cut: every
  // step and every evaluation stands there once. `peak` is rank 0's.
  Metrics(const std::filesystem::path& run_dir, const RunConfig& run, std::int64_t from_step, int ranks,
          PeakRate peak);

  void step(const StepReport& report);
  void evaluation(std::int64_t step, const std::vector<HeldOutLoss>& losses);  // of at least one set
  void sync();  // what was said so far is on the disk, or a warning

 private:
  void line(const std::string& json);
  void console(const StepReport& report, double tokens_per_s);
  const RunConfig& run_;
  std::filesystem::path path_;
  std::optional<AppendedFile> file_;
  std::optional<EventFile> events_;
  int ranks_;
  PeakRate peak_;
  double slow_seconds_ = 0;  // smoothed seconds per step, for the time left
  bool terminal_;
  bool warned_ = false;
};

}  // namespace upmoe
