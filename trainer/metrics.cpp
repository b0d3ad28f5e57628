#include "trainer/metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <nlohmann/json.hpp>

#include "data/posix_file.h"
#include "kernels/core/log.h"
#include "kernels/core/philox.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// Keeps the lines up to `from_step`; the rest, a torn last line included, goes to PATH.cut.
void cut_after(const fs::path& path, std::int64_t from_step) {
  std::ifstream in(path);
  if (!in) return;
  std::string keep, cut, text;
  while (std::getline(in, text)) {
    const json j = json::parse(text, nullptr, false);
    const bool good = j.is_object() && j.contains("step") && j["step"].is_number_integer();
    (good && j["step"].get<std::int64_t>() <= from_step ? keep : cut) += text + "\n";
  }
  if (in.bad()) throw SystemError(path, "reading", errno != 0 ? errno : EIO);
  in.close();
  if (cut.empty()) return;
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
                 double peak_flops)
    : run_(run),
      path_(run_dir / "metrics.jsonl"),
      ranks_(ranks),
      peak_flops_(peak_flops),
      terminal_(isatty(2) != 0) {
  cut_after(path_, from_step);
  errno = 0;
  file_.open(path_, std::ios::app);
  if (!file_) throw SystemError(path_, "opening for writing", errno != 0 ? errno : EIO);
  if (run.log.tensorboard) events_.emplace(run_dir / "tensorboard");
}

void Metrics::line(const std::string& text) {
  file_ << text << '\n' << std::flush;
  if (!file_ && !warned_) {
    log::warning("{}: cannot be written; training goes on, metrics are lost", path_.string());
    warned_ = true;
  }
}

void Metrics::step(const StepReport& r) {
  slow_seconds_ = slow_seconds_ == 0 ? r.seconds : 0.9 * slow_seconds_ + 0.1 * r.seconds;
  if (r.step % run_.log.every != 0 && r.step != run_.train.steps && r.step != 1 && !r.skipped) return;
  const double per_step = static_cast<double>(run_.train.global_batch * run_.data.seq_len);
  const double tokens_per_s = per_step / r.seconds, tflops = r.flops_per_rank / r.seconds * 1e-12;
  const LoadSummary load = summarise(r.expert_load);
  json j{{"step", r.step},
         {"tokens", r.step * run_.train.global_batch * run_.data.seq_len},
         {"loss", r.loss},
         {"aux_loss", r.aux_loss},
         {"z_loss", r.z_loss},
         {"lr", r.lr},
         {"grad_norm", r.grad_norm},
         {"seconds", r.seconds},
         {"tokens_per_s", tokens_per_s},
         {"tflops_per_rank", tflops},
         {"mfu", peak_flops_ > 0 ? json(tflops * 1e12 / peak_flops_) : json()},
         {"flops", r.flops_per_rank},
         {"ranks", ranks_},
         {"memory_peak_bytes", peak_memory_bytes()}};
  if (!r.expert_load.empty()) {
    j["expert_load_max"] = load.largest;
    j["expert_load_min"] = load.smallest;
    j["dead_experts"] = load.dead;
    j["expert_load"] = r.expert_load;
  }
  if (r.skipped) j["skipped"] = true;
  line(j.dump());
  if (events_) {
    std::vector<std::pair<std::string, double>> scalars{{"train/loss", r.loss},
                                                        {"train/grad_norm", r.grad_norm},
                                                        {"train/lr", r.lr},
                                                        {"perf/tokens_per_s", tokens_per_s},
                                                        {"perf/tflops_per_rank", tflops}};
    if (!r.expert_load.empty()) {
      scalars.insert(scalars.end(), {{"moe/aux_loss", r.aux_loss},
                                     {"moe/z_loss", r.z_loss},
                                     {"moe/load_max", load.largest},
                                     {"moe/load_min", load.smallest},
                                     {"moe/dead_experts", static_cast<double>(load.dead)}});
    }
    events_->scalars(r.step, scalars);
  }
  console(r, tokens_per_s);
}

void Metrics::console(const StepReport& r, double tokens_per_s) {
  const bool last = r.step == run_.train.steps;
  const std::string left = duration(slow_seconds_ * static_cast<double>(run_.train.steps - r.step));
  const std::string text =
      fmt::format("step {}/{}  loss {:.4f}  aux {:.4f}  norm {:.3f}  lr {:.2e}  {:.0f} tok/s  left {}{}",
                  r.step, run_.train.steps, r.loss, r.aux_loss, r.grad_norm, r.lr, tokens_per_s, left,
                  r.skipped ? "  SKIPPED: not finite" : "");
  if (terminal_) {
    constexpr std::int64_t kWidth = 24;
    const std::int64_t done = kWidth * r.step / std::max<std::int64_t>(1, run_.train.steps);
    fmt::print(stderr, "\r\x1b[K[{:=<{}}{: <{}}] {}{}", "", done, "", kWidth - done, text, last ? "\n" : "");
    std::fflush(stderr);
  } else if (last || r.step <= 3 || r.step % std::max<std::int64_t>(1, run_.train.steps / 20) == 0 ||
             r.skipped) {
    log::info("{}", text);
  }
}

void Metrics::evaluation(std::int64_t step, const EvalResult& result) {
  line(json{{"kind", "eval"},
            {"step", step},
            {"tokens", step * run_.train.global_batch * run_.data.seq_len},
            {"eval_loss", result.loss},
            {"eval_tokens", result.tokens},
            {"seconds", result.seconds}}
           .dump());
  if (events_) events_->scalars(step, {{"eval/loss", result.loss}});
  log::info("{}step {}  held-out loss {:.4f} over {} tokens", terminal_ ? "\n" : "", step, result.loss,
            result.tokens);
}

namespace {

// Random numbers, a block of them repeated: products of equal numbers can run faster than real ones.
void fill_random(Exec& ex, TensorView t) {
  constexpr std::int64_t kBlock = 1 << 18;
  const Buffer memory = Buffer::allocate({}, kBlock * sizeof(float));
  const TensorView block = memory.view({std::min(kBlock, t.elements())}, t.dtype);
  for (std::int64_t i = 0; i < block.elements(); ++i) {
    const float x = uniform_from_bits(philox(1, static_cast<std::uint64_t>(i))[0]) - 0.5f;
    if (t.dtype == DType::kF32) block.as<float>()[i] = x;
    if (t.dtype == DType::kBF16) block.as<bf16>()[i] = to_bf16(x);
  }
  const TensorView flat = t.reshape({t.elements()});
  for (std::int64_t at = 0; at < flat.elements(); at += block.elements())
    ops::upload(ex, flat.rows(at, at + block.elements()), block);
}

// Seconds of the best of some products of two square matrices, `budget` seconds of them.
double best_product(Exec& ex, DType dtype, std::int64_t side, double budget) {
  ScratchScope scope(*ex.scratch);
  TensorView a = ex.scratch->take({side, side}, dtype, "peak a"),
             b = ex.scratch->take({side, side}, dtype, "peak b");
  TensorView c = ex.scratch->take({side, side}, dtype, "peak c");
  fill_random(ex, a);
  fill_random(ex, b);
  const auto wait = [&] {
    if (ex.stream != nullptr) ex.stream->synchronize();
  };
  wait();
  const auto once = [&] {
    const auto start = std::chrono::steady_clock::now();
    ops::gemm(ex, c, a, Transpose::kNo, b, Transpose::kYes, Accumulate::kOverwrite);
    wait();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  once();
  double best = once();
  for (double spent = best; spent < budget;) {
    const double t = once();
    best = std::min(best, t);
    spent += t;
  }
  return best;
}

}  // namespace

double measure_peak_flops(Exec& ex, DType dtype) {
  const std::int64_t largest = ex.device.type == DeviceType::kCuda ? 8192 : 1024;
  Exec quiet = ex;
  quiet.ledger = nullptr;
  std::int64_t side = 256;  // powers of two: whole blocks of random numbers
  while (side < largest && best_product(quiet, dtype, side, 0) < 0.03) side *= 2;
  return 2.0 * static_cast<double>(side * side * side) / best_product(quiet, dtype, side, 0.2);
}

}  // namespace upmoe
