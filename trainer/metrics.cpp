#include "trainer/metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <nlohmann/json.hpp>

#include "data/posix_file.h"
#include "data/staged_directory.h"
#include "kernels/core/log.h"
#include "kernels/core/system_error.h"

namespace upmoe {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// The first step that a start writes. One that begins anew evaluates before its first step: an earlier attempt's line
// of that may be of another model.
std::int64_t first_written(std::int64_t from_step) {
  return from_step > 0 ? from_step + 1 : 0;
}

// Keeps the lines before `first_step`; the rest, a torn last line included, goes to PATH.cut.
void cut_from(const fs::path& path, std::int64_t first_step) {
  // A run that was killed has written steps behind its last checkpoint; it computes them again, and each step stands
  // once.
  std::ifstream in(path);
  if (!in) return;
  std::string keep, cut, text;
  while (std::getline(in, text)) {
    const json j = json::parse(text, nullptr, false);
    const bool good = j.is_object() && j.contains("step") && j["step"].is_number_integer();
    (good && j["step"].get<std::int64_t>() < first_step ? keep : cut) += text + "\n";
  }
  if (in.bad()) throw SystemError(path, "reading", errno != 0 ? errno : EIO);
  in.close();
  if (cut.empty()) return;
  // Appended to before the file is replaced: who is killed in between has the lines twice, never not at all.
  const std::string aside = path.string() + ".cut";
  errno = 0;
  if (!(std::ofstream(aside, std::ios::app) << cut << std::flush))
    throw SystemError(aside, "writing", errno != 0 ? errno : EIO);
  replace_text(path, keep);
}

std::uint64_t peak_memory_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024u;
}

struct LoadSummary {
  double largest = 0, smallest = 0;
  std::int64_t dead = 0;
};

// Loads relative to a balanced router: 1 is the mean.
LoadSummary summarise(const std::vector<std::vector<double>>& load) {
  LoadSummary s;
  bool first = true;
  for (const auto& layer : load)
    for (const double share : layer) {
      const double relative = share * static_cast<double>(layer.size());
      s.largest = first ? relative : std::max(s.largest, relative);
      s.smallest = first ? relative : std::min(s.smallest, relative);
      s.dead += share == 0.0;
      first = false;
    }
  return s;
}

std::string duration(double seconds) {
  const auto s = static_cast<std::int64_t>(seconds);
  return s >= 3600 ? fmt::format("{}h{:02}m", s / 3600, s / 60 % 60)
                   : fmt::format("{}m{:02}s", s / 60, s % 60);
}

}  // namespace

Metrics::Metrics(const fs::path& run_dir, const RunConfig& run, std::int64_t from_step, int ranks,
                 PeakRate peak)
    : run_(run), path_(run_dir / "metrics.jsonl"), ranks_(ranks), peak_(peak), terminal_(isatty(2) != 0) {
  cut_from(path_, first_written(from_step));
  errno = 0;
  if (!std::ofstream(path_, std::ios::app))
    throw SystemError(path_, "opening for writing", errno != 0 ? errno : EIO);
  file_.emplace(path_, "metrics");
  if (run.log.tensorboard) events_.emplace(run_dir / "tensorboard", first_written(from_step));
}

void Metrics::line(const std::string& text) {
  file_->append(text + "\n");
}

void Metrics::sync() {
  try {
    sync_path(path_);
  } catch (const Error& e) {
    if (!warned_) log::warning("{}; training goes on, a power cut may lose metrics", e.what());
    warned_ = true;
  }
}

void Metrics::step(const StepReport& r) {
  slow_seconds_ = slow_seconds_ == 0 ? r.seconds : 0.9 * slow_seconds_ + 0.1 * r.seconds;
  if (r.step % run_.log.every != 0 && r.step != run_.train.steps && r.step != 1 && !r.skipped) return;
  const double per_step = static_cast<double>(run_.tokens_per_step());
  const double tokens_per_s = per_step / r.seconds, tflops = r.flops_per_rank / r.seconds * 1e-12;
  const double mfu = peak_.share(r.flops_per_rank, r.seconds);
  const LoadSummary load = summarise(r.expert_load);
  json j{{"step", r.step},
         {"tokens", r.step * run_.tokens_per_step()},
         {"loss", r.loss},
         {"aux_loss", r.aux_loss},
         {"z_loss", r.z_loss},
         {"lr", r.lr},
         {"grad_norm", r.grad_norm},
         {"seconds", r.seconds},
         {"tokens_per_s", tokens_per_s},
         {"tflops_per_rank", tflops},
         {"mfu", mfu},
         {"flops", r.flops_per_rank},
         {"flops_computed", r.computed_flops_per_rank},
         {"bytes_sent", r.bytes_sent},
         {"ranks", ranks_},
         {"tensors_peak_bytes", r.tensors_peak},
         {"memory_peak_bytes", peak_memory_bytes()}};
  if (r.seconds_waited) j["seconds_waited"] = *r.seconds_waited;
  if (masks_targets(run_.data)) j["targets"] = r.targets;
  if (run_.train.teacher.given()) {
    j["distill_loss"] = r.distill_loss;
    j["flops_teacher"] = r.teacher_flops_per_rank;
  }
  if (r.aux_losses.size() > 1)
    for (std::size_t i = 0; i < r.aux_losses.size(); ++i)
      j["aux_losses"][name_of(run_.router.aux_kind[i])] = r.aux_losses[i];
  if (!r.expert_load.empty()) {
    j["expert_load_max"] = load.largest;
    j["expert_load_min"] = load.smallest;
    j["dead_experts"] = load.dead;
    j["expert_load"] = r.expert_load;
    j["dropped_share"] = r.dropped;
  }
  if (r.skipped) j["skipped"] = true;
  line(j.dump());
  if (events_) {
    std::vector<std::pair<std::string, double>> scalars{{"train/loss", r.loss},
                                                        {"train/grad_norm", r.grad_norm},
                                                        {"train/lr", r.lr},
                                                        {"perf/tokens_per_s", tokens_per_s},
                                                        {"perf/tflops_per_rank", tflops}};
    if (run_.train.teacher.given()) scalars.emplace_back("train/distill_loss", r.distill_loss);
    if (!r.expert_load.empty()) {
      scalars.insert(scalars.end(), {{"moe/aux_loss", r.aux_loss},
                                     {"moe/z_loss", r.z_loss},
                                     {"moe/load_max", load.largest},
                                     {"moe/load_min", load.smallest},
                                     {"moe/dead_experts", static_cast<double>(load.dead)},
                                     {"moe/dropped_share", r.dropped}});
    }
    events_->scalars(r.step, scalars);
  }
  console(r, tokens_per_s);
}

void Metrics::console(const StepReport& r, double tokens_per_s) {
  const bool last = r.step == run_.train.steps;
  const std::string left = duration(slow_seconds_ * static_cast<double>(run_.train.steps - r.step));
  const std::string distilled =
      run_.train.teacher.given() ? fmt::format("  distill {:.4f}", r.distill_loss) : "";
  const std::string text =
      fmt::format("step {}/{}  loss {:.4f}{}  aux {:.4f}  norm {:.3f}  lr {:.2e}  {:.0f} tok/s  left {}{}",
                  r.step, run_.train.steps, r.loss, distilled, r.aux_loss, r.grad_norm, r.lr, tokens_per_s,
                  left, r.skipped ? "  SKIPPED: not finite" : "");
  if (terminal_) {
    constexpr std::int64_t kWidth = 24;
    const std::int64_t done = kWidth * r.step / std::max<std::int64_t>(1, run_.train.steps);
    const std::string bar =
        fmt::format("\r\x1b[K[{:=<{}}{: <{}}] {}{}", "", done, "", kWidth - done, text, last ? "\n" : "");
    (void)!write(2, bar.data(), bar.size());  // a terminal that was closed is no reason to stop
  } else if (last || r.step <= 3 || r.step % std::max<std::int64_t>(1, run_.train.steps / 20) == 0 ||
             r.skipped) {
    log::info("{}", text);
  }
}

void Metrics::evaluation(std::int64_t step, const std::vector<HeldOutLoss>& losses) {
  const EvalResult result = together(losses);
  json j{{"kind", "eval"},
         {"step", step},
         {"tokens", step * run_.tokens_per_step()},
         {"eval_loss", result.loss},
         {"eval_tokens", result.tokens},
         {"seconds", result.seconds}};
  std::vector<std::pair<std::string, double>> scalars{{"eval/loss", result.loss}};
  std::string each;
  for (const HeldOutLoss& of : losses) {
    if (of.name.empty()) continue;
    j["valid_loss"][of.name] = of.result.loss;
    j["valid_tokens"][of.name] = of.result.tokens;
    scalars.emplace_back("eval/loss/" + of.name, of.result.loss);
    each += fmt::format("{}{} {:.4f}", each.empty() ? ": " : ", ", of.name, of.result.loss);
  }
  line(j.dump());
  if (events_) events_->scalars(step, scalars);
  if (!std::isfinite(result.loss)) log::warning("step {}: the held-out loss is not finite", step);
  log::info("{}step {}  held-out loss {:.4f} over {} tokens{}", terminal_ ? "\n" : "", step, result.loss,
            result.tokens, each);
}

}  // namespace upmoe
