#include "trainer/training_run.h"

#include <fmt/format.h>
#include <unistd.h>

#include "configs/nearest_meshes.h"
#include "configs/run_problems.h"
#include "data/checkpoint_folder.h"
#include "data/folder.h"
#include "data/model_source.h"
#include "data/store_writer.h"
#include "data/tokenizer_match.h"
#include "kernels/core/log.h"
#include "parallel/watchdog.h"
#include "trainer/held_out.h"
#include "trainer/memory_estimate.h"
#include "trainer/metrics.h"
#include "trainer/one_program.h"
#include "trainer/resumption.h"
#include "trainer/run_checkpoints.h"
#include "trainer/run_directory.h"
#include "trainer/run_lock.h"
#include "trainer/run_summary.h"
#include "trainer/same_inputs.h"
#include "trainer/shared_folder.h"
#include "trainer/stop_requests.h"
#include "trainer/trainer.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

class Run {
 public:
  Run(const RunConfig& run, Communicator& world, const RunOptions& options)
      : run_(run),
        options_(options),
        world_(world),
        dir_(run.run.dir),
        checkpoints_(dir_, run.checkpoint, world) {
    digest_ = require_one_program(world_);
    require_equal(world_, "configurations", to_yaml(run));
    run_agreed(world_, [&] { prepare(options_.fresh); });
    require_shared(world_, dir_);  // before the first save, which may be hours away
    // Under the lock of the run directory: left-overs may be cleared and damaged checkpoints set aside.
    checkpoints_.take_over(lock_.get());
    const std::optional<fs::path> newest = checkpoints_.choose();
    run_agreed(world_, [&] {
      if (world_.rank() == 0 && newest) resumption_ = std::make_unique<Resumption>(*newest, run_);
    });
    run_agreed(world_, [&] {
      const ModelConfig config = open_config(newest);
      open_teacher();
      require_possible(on_device(run_, options_.device), config, world_.size());
      session_config_ = config;
      take_digests(!newest);
    });
    ReadInputs read{.models = models_in_lines(session_config_, source_.get(), teacher_.get()),
                    .weights = model_digest_ + teacher_digest_,
                    .data = {},
                    .held_out = {}};
    compare_models(world_, read);
    // What is wrong with the configuration, the mesh or the model was found before this: from here on memory is taken
    // and groups are made.
    session_ = std::make_unique<Session>(run_, session_config_, world_, options_.device);
    warn_of_memory(*session_, world_);
    run_agreed(world_, [&] { load(newest); });
    read.data = data_in_lines(*session_->data);
    read.held_out = fingerprint_of(valid_);
    compare_data(world_, read);
  }

  int execute();

 private:
  void prepare(bool fresh) {
    if (world_.rank() != 0) return;
    make_run_directory(dir_);
    lock_ = std::make_unique<RunLock>(dir_);
    const std::vector<fs::path> there = checkpoint_folders(checkpoints_.dir());
    if (fresh && !there.empty())
      fail(ExitCode::kUsage, "--fresh: {} holds {}; choose another run.dir or remove it", dir_.string(),
           there.back().string());
  }

  ModelConfig open_config(const std::optional<fs::path>& checkpoint) {
    StartModel start = open_start(run_, checkpoint);
    source_ = std::move(start.source);
    return start.config;
  }

  void open_teacher() {
    RunConfig::Train::Teacher& teacher = run_.train.teacher;
    if (!teacher.given()) return;
    teacher_ = open_model(teacher.model);
    teacher.config = std::make_shared<const ModelConfig>(teacher_->config());
  }

  // Of what each host may have of its own: a run's checkpoints are the same files for all (checkpoint_choice.h).
  void take_digests(bool begins) {
    if (begins) model_digest_ = model_digest(session_config_, source_.get());
    if (teacher_ != nullptr) teacher_digest_ = digest_of(*teacher_);
  }

  void load(const std::optional<fs::path>& checkpoint);
  void load_teacher();
  void warn_of_room();
  void start_metrics();
  void evaluate_now(std::int64_t step);
  const TrainState& state_to_save(std::int64_t step);
  void count_nonfinite(const StepReport& report);

  RunConfig run_;  // with the configuration of its teacher, once that was opened
  const RunOptions options_;
  Communicator& world_;
  fs::path dir_;
  std::unique_ptr<RunLock> lock_;
  RunCheckpoints checkpoints_;
  ModelConfig session_config_;
  std::unique_ptr<Resumption> resumption_;         // rank 0, of a run that goes on
  std::unique_ptr<ModelSource> source_, teacher_;  // the second until it was loaded
  std::unique_ptr<Session> session_;
  std::vector<HeldOutData> valid_;
  std::unique_ptr<Metrics> metrics_;  // rank 0
  TrainState state_;
  std::string digest_;  // of the program
  // Of what is read beside the run's own checkpoint; empty: nothing.
  std::string model_digest_, teacher_digest_;
  std::int64_t evaluated_step_ = -1, nonfinite_ = 0;
};

void Run::load(const std::optional<fs::path>& checkpoint) {
  Session& s = *session_;
  if (checkpoint) {
    state_ = load_checkpoint(ShardStore(*checkpoint), s);
    checkpoints_.resumed(*checkpoint, state_.step);
    if (world_.rank() == 0) {
      log::info("resuming from {} (step {})", checkpoint->string(), state_.step);
      for (const std::string& line : resumption_->lines()) log::info("  {}", line);
      state_.source = resumption_->source();
    }
  } else {
    state_.source = fs::absolute(run_.model.path).string();
    state_.source_digest = model_digest_;
    if (run_.model.init == ModelInit::kRandom) {
      s.params.initialise(s.memory.exec, run_.run.seed);
      s.optimizer.reset(s.memory.exec);
    } else {
      load_model(*source_, s);
    }
  }
  // Before the data is opened, which goes on at the beginning of a step.
  if (checkpoint) require_whole_steps(run_, state_.step, state_.samples);
  load_teacher();
  s.open_data(state_.samples);
  if (checkpoint)
    require_same_data(run_, *s.data, *checkpoint, state_.fingerprint,
                      resumption_ ? resumption_->changes_of("data") : "");
  state_.fingerprint = s.data->fingerprint();
  valid_ = open_held_out(run_.data, s.config.vocab_size);
  if (world_.rank() != 0) return;
  std::vector<const TokenFile*> files = s.data->files();
  for (const HeldOutData& set : valid_) files.push_back(set.data->files().front());
  warn_of_tokenizers(source_ == nullptr ? fs::path(run_.model.path) : source_->companions(), files);
}

void Run::load_teacher() {
  state_.teacher_digest.clear();
  if (teacher_ == nullptr) return;
  session_->teacher->load(session_->memory.exec, *teacher_);
  state_.teacher_digest = teacher_digest_;
  if (world_.rank() == 0) {
    const std::string words = teacher_tokenizer_difference(
        source_ == nullptr ? fs::path(run_.model.path) : source_->companions(), teacher_->companions());
    if (!words.empty()) log::warning("{}", words);
  }
  teacher_.reset();
}

// Said before hours are spent, not after them.
void Run::warn_of_room() {
  double bytes = static_cast<double>(CheckpointWriter::bytes_of(*session_));
  world_.all_reduce(host_view(&bytes, {1}), ReduceOp::kSum);
  if (world_.rank() != 0) return;
  const auto needed = static_cast<double>(StoreWriter::space_for(static_cast<std::uint64_t>(bytes))),
             free = static_cast<double>(free_bytes_at(dir_));
  constexpr double kMega = 1e6;
  if (free < needed && checkpoint_folders(checkpoints_.dir()).empty())
    log::warning(
        "{}: a checkpoint of this run takes {:.1f} MB of disk, and {:.1f} MB are free: none can be written, "
        "and what is trained would be lost",
        dir_.string(), needed / kMega, free / kMega);
}

void Run::start_metrics() {
  world_.barrier();
  const PeakRate peak(session_->memory.exec, session_->params.compute_dtype());
  run_agreed(world_, [&] {
    if (world_.rank() != 0) return;
    metrics_ = std::make_unique<Metrics>(dir_, run_, state_.step, world_.size(), peak);
    write_run_config(dir_, run_, state_.step + 1,
                     resumption_ ? resumption_->changes() : std::vector<ConfigChange>{});
    const bool random = run_.model.init == ModelInit::kRandom;
    const RunStart start{options_.origin, options_.cores, digest_, random ? nullptr : source_.get(), valid_};
    write_start(dir_, start_record(start, *session_, state_), state_.step > 0);
    log_run_summary(*session_, state_, valid_, options_.cores);
  });
}

void Run::evaluate_now(std::int64_t step) {
  if (valid_.empty() || evaluated_step_ == step) return;
  evaluated_step_ = step;
  session_->reducer.await_all_values(session_->memory.exec);
  std::vector<HeldOutLoss> losses;
  for (const HeldOutData& set : valid_)
    losses.push_back(
        {set.name, evaluate(*session_, *set.data,
                            {run_.train.eval_sequences, run_.train.micro_batch, run_.data.mask_documents})});
  if (metrics_) metrics_->evaluation(step, losses);
}

// A power cut must not leave a checkpoint whose steps have no lines.
const TrainState& Run::state_to_save(std::int64_t step) {
  if (metrics_) metrics_->sync();
  state_.step = step;
  state_.samples = step * run_.train.global_batch;
  return state_;
}

void Run::count_nonfinite(const StepReport& report) {
  nonfinite_ = report.skipped ? nonfinite_ + 1 : 0;
  if (!report.skipped) return;
  if (!report.culprit.empty())
    log::warning("step {}: the gradient of {} is not finite; no update", report.step, report.culprit);
  if (nonfinite_ < run_.train.nonfinite_patience) return;
  if (checkpoints_.busy()) checkpoints_.finish();
  const std::string distilled =
      run_.train.teacher.given() ? fmt::format(", divergence from the teacher {}", report.distill_loss) : "";
  fail(ExitCode::kNumeric,
       "loss {}{} and gradient norm {} were not finite for {} steps in a row, the last one {}; the "
       "newest checkpoint in {} is from before. Lower optimizer.lr, or look at the data of samples {} to {}",
       report.loss, distilled, report.grad_norm, nonfinite_, report.step, checkpoints_.dir().string(),
       (report.step - nonfinite_) * run_.train.global_batch, report.step * run_.train.global_batch - 1);
}

int Run::execute() {
  if (state_.step >= run_.train.steps) {
    if (world_.rank() == 0)
      log::info("nothing to do: step {} of {} is reached", state_.step, run_.train.steps);
    return static_cast<int>(ExitCode::kDone);
  }
  warn_of_room();
  start_metrics();
  Trainer trainer(*session_);
  const auto due = [](std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; };
  if (state_.step == 0) evaluate_now(0);
  for (std::int64_t step = state_.step + 1; step <= run_.train.steps; ++step) {
    const StepReport report = trainer.step(step, take_requests());
    watchdog::heartbeat();
    if (metrics_) metrics_->step(report);
    count_nonfinite(report);
    if (due(run_.train.eval_every, step)) evaluate_now(step);
    // A save in the background is committed once all ranks have written; asked after every step, at the same step by
    // all.
    checkpoints_.poll();
    if (report.requests >= kStopRequest) {
      checkpoints_.save_last(*session_, state_to_save(step));
      if (world_.rank() == 0)
        log::info("stopped on request after step {}; start the same command again to go on", step);
      return static_cast<int>(ExitCode::kStopped);
    }
    // Not in a row of steps that are skipped: should it end the run, the newest checkpoint is from before it.
    if ((due(run_.checkpoint.every, step) && nonfinite_ == 0) || report.requests > 0)
      checkpoints_.begin(*session_, state_to_save(step), run_.checkpoint.async);
    if (checkpoints_.busy() && !run_.checkpoint.async) checkpoints_.finish();
  }
  evaluate_now(run_.train.steps);
  checkpoints_.save_last(*session_, state_to_save(run_.train.steps));
  return static_cast<int>(ExitCode::kDone);
}

}  // namespace

int train(const RunConfig& run, Communicator& world, const RunOptions& options) {
  Run job(run, world, options);
  return job.execute();
}

}  // namespace upmoe
