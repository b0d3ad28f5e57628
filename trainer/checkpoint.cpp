#include "trainer/checkpoint.h"

#include <algorithm>
#include <atomic>

#include "data/checkpoint_folder.h"
#include "data/run_metadata.h"
#include "kernels/core/log.h"
#include "kernels/ops/transfer.h"
#include "parallel/watchdog.h"
#include "trainer/freeze.h"

namespace upmoe {

namespace fs = std::filesystem;

// What this rank owns, copied so that training may go on while it is written.
struct CheckpointWriter::Staged {
  Buffer memory;
  std::vector<StorePiece> pieces;
  std::uint64_t bytes = 0;
};

namespace {

std::string metadata_of(const Session& s, const TrainState& state) {
  std::optional<std::string> teacher;
  if (!state.teacher_digest.empty()) teacher = state.teacher_digest;
  return run_metadata_json({.step = state.step,
                            .samples = state.samples,
                            .tokens = state.samples * s.run.data.seq_len,
                            .model_config = to_hf_json(s.config),
                            .source = state.source,
                            .data_fingerprint = state.fingerprint,
                            .config = to_yaml(s.run),
                            .mesh = s.mesh.spec().str(),
                            .source_digest = state.source_digest,
                            .teacher_digest = teacher,
                            .moments_begun = state.moments_begun});
}

std::size_t aligned(std::size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace

CheckpointWriter::CheckpointWriter(fs::path checkpoints_dir) : dir_(std::move(checkpoints_dir)) {}

std::uint64_t CheckpointWriter::bytes_of(const Session& s) {
  std::size_t bytes = 0;
  for (const StoredParam& p : s.params.all())
    if (p.owned.size() > 0) bytes += aligned(p.owned_value().bytes());
  for (const OwnedSlice& slice : s.optimizer.slices())
    // The moments are written in fp32 in whatever form they are kept: the bytes of a checkpoint do not tell it.
    bytes += (slice.has_master() ? 3 : 2) *
             aligned(static_cast<std::size_t>(slice.weight.elements()) * sizeof(float));
  return bytes;
}

CheckpointWriter::~CheckpointWriter() {
  if (thread_.joinable()) thread_.join();
}

void CheckpointWriter::stage(Session& session, Staged& staged) {
  Exec& ex = session.memory.exec;
  staged.bytes = bytes_of(session);
  staged.memory = Buffer::allocate({}, staged.bytes, "the copy for a checkpoint");
  std::size_t at = 0;
  const auto room_for = [&](const StoredParam& p, const char* kind, DType dtype) {
    StorePiece piece;
    piece.tensor = p.spec.name;
    piece.kind = kind;
    piece.global = p.spec.shape;
    piece.boxes = flat_range_to_boxes(p.shard, p.owned);
    const TensorView room{staged.memory.data() + at, {p.owned.size()}, dtype, {}};
    piece.values = room;
    at += aligned(room.bytes());
    staged.pieces.push_back(std::move(piece));
    return room;
  };
  for (const StoredParam& p : session.params.all())
    if (p.owned.size() > 0) ops::download(ex, room_for(p, "weight", p.value.dtype), p.owned_value());
  for (const OwnedSlice& slice : session.optimizer.slices()) {
    if (slice.has_master()) ops::download(ex, room_for(*slice.param, "master", DType::kF32), slice.master);
    const TensorView m = room_for(*slice.param, "m", DType::kF32),
                     v = room_for(*slice.param, "v", DType::kF32);
    save_moments(ex, slice, m, v);
  }
}

// In the background training stands still for the copy and for the commit only (and where a save is due before the last
// one is written):
//
//   training      step 20 | copy |  step 21  |  step 22  |  step 23  | commit |  step 24
//   thread                       |  this rank's shard  |
//
// The copy makes the values those of one step on all ranks, whatever is trained meanwhile. Commit comes between two
// steps, as the ranks meet in it, and the step at which it comes is one that all have agreed on.
void CheckpointWriter::begin(Session& session, const TrainState& state, Communicator& world,
                             bool in_background) {
  UPMOE_CHECK(!busy(), "one checkpoint at a time");
  auto staged = std::make_unique<Staged>();
  // Agreed: a rank that lacks the memory and goes on without this save would leave the others in it.
  run_agreed(world, [&] { stage(session, *staged); });
  target_ = checkpoint_path(dir_, state.step);
  metadata_ = metadata_of(session, state);
  writer_ = std::make_unique<StoreWriter>(target_, world, staged->bytes);
  staged_ = std::move(staged);
  written_ = false;
  lacked_space_ = false;
  const auto write = [this] {
    writer_->write(staged_->pieces);
    written_ = true;
  };
  if (in_background) {
    thread_ = std::jthread(write);
  } else {
    write();
  }
}

bool CheckpointWriter::written() const {
  return written_;
}

CheckpointWriter::Committed CheckpointWriter::finish(Communicator& world) {
  UPMOE_CHECK(busy(), "no checkpoint under way");
  watchdog::wait_until([this] { return written(); });
  if (thread_.joinable()) thread_.join();
  const std::unique_ptr<StoreWriter> writer = std::move(writer_);
  const std::unique_ptr<Staged> staged = std::move(staged_);
  lacked_space_ = false;
  try {
    const bool durable = writer->commit(world, metadata_);
    return {target_, durable};
  } catch (const Error&) {
    lacked_space_ = writer->lacked_space();
    throw;
  }
}

namespace {

void require_same_model(const ShardStore& store, const Session& session) {
  std::string differences;
  const auto& stored = store.tensors();
  for (const StoredParam& p : session.params.all()) {
    const auto it = stored.find({p.spec.name, "weight"});
    if (it == stored.end() && p.spec.added) {
      if (session.mesh.rank() == 0) log::info("{}: not in the checkpoint, begins anew", p.spec.name);
    } else if (it == stored.end()) {
      differences += fmt::format("\n  {}: missing in the checkpoint", p.spec.name);
    } else if (!(it->second.shape == p.spec.shape)) {
      differences += fmt::format("\n  {}: checkpoint {}, model {}", p.spec.name, it->second.shape.str(),
                                 p.spec.shape.str());
    }
  }
  for (const auto& [key, tensor] : stored)
    if (key.second == "weight" && !session.params.has(key.first))
      differences += fmt::format("\n  {}: not in the model", key.first);
  if (!differences.empty())
    fail(ExitCode::kBadInput,
         "the checkpoint belongs to another model:{}\nuse another run.dir, or the model it was made with",
         differences);
}

// What the slice owns, box by box: read(box, out on the host).
template <class Read>
void read_flat(const OwnedSlice& slice, TensorView out, const Read& read) {
  std::int64_t at = 0;
  for (const Box& box : flat_range_to_boxes(slice.param->shard, slice.param->owned)) {
    read(box, out.rows(at, at + box.elements()));
    at += box.elements();
  }
}

void read_moments(Exec& ex, const ShardStore& store, const OwnedSlice& slice) {
  const Shape shape{slice.weight.elements()};
  const Buffer memory = Buffer::allocate({}, 2 * static_cast<std::size_t>(shape.elements()) * sizeof(float));
  const TensorView both = memory.view({2 * shape[0]}, DType::kF32), m = both.rows(0, shape[0]),
                   v = both.rows(shape[0], 2 * shape[0]);
  const auto kind = [&](const char* name) {
    return [&, name](const Box& box, TensorView out) { store.read(slice.param->spec.name, name, box, out); };
  };
  read_flat(slice, m, kind("m"));
  read_flat(slice, v, kind("v"));
  load_moments(ex, slice, m, v);
}

// Weights as they are trained in, masters in fp32 each from the best value there is, moments zero. What `has` does
// not know begins as the table says.
void load_values(Session& session, const ReadParam& read, const std::function<bool(const ParamSpec&)>& has) {
  Exec& ex = session.memory.exec;
  const auto values = [&](const ParamSpec& spec, const Box& box, TensorView out) {
    has(spec) ? read(spec, box, out)
              : initial_values(spec, static_cast<std::int64_t>(session.run.run.seed), box, out);
  };
  session.params.load(ex, values);
  session.optimizer.reset(ex);
  for (const OwnedSlice& slice : session.optimizer.slices()) {
    if (!slice.has_master()) continue;
    ops::write_through_host(ex, slice.master, [&](TensorView out) {
      read_flat(slice, out, [&](const Box& box, TensorView part) { values(slice.param->spec, box, part); });
    });
  }
}

bool is_frozen(const ParamSpec& p, const std::vector<std::string>& frozen) {
  return !p.trained || std::find(frozen.begin(), frozen.end(), p.name) != frozen.end();
}

// Of all ranks' parameters, as rank 0 writes it down: what trains from `step` on and did not until then.
std::map<std::string, std::int64_t> moments_that_begin(const ShardStore& store, const Session& session,
                                                       std::int64_t step) {
  std::map<std::string, std::int64_t> begun;
  const std::vector<std::string> frozen = frozen_names(session.run.freeze, session.config);
  for (const ParamSpec& p : make_param_table(session.config))
    if (step > 0 && !is_frozen(p, frozen) && !store.tensors().contains({p.name, "m"})) begun[p.name] = step;
  return begun;
}

// Of all ranks' parameters.
void warn_of_rounding(const ShardStore& store, const Session& session) {
  const std::vector<std::string> frozen = frozen_names(session.run.freeze, session.config);
  const std::vector<ParamSpec> table = make_param_table(session.config);
  const auto rounded = std::count_if(table.begin(), table.end(), [&](const ParamSpec& p) {
    return is_frozen(p, frozen) && store.tensors().contains({p.name, "master"});
  });
  if (rounded > 0 && session.params.compute_dtype() == DType::kBF16)
    log::warning(
        "{} parameters that are frozen here were trained with fp32 masters, and are held in bf16 from now "
        "on: what they learnt below its grain is lost. Freeze with train.precision: fp32 to keep it; {} has "
        "it still",
        rounded, store.dir().string());
}

}  // namespace

void load_model(const ModelSource& model, Session& session) {
  load_values(
      session, [&](const ParamSpec& spec, const Box& box, TensorView out) { model.read(spec, box, out); },
      [&](const ParamSpec& spec) { return model.has(spec); });
}

TrainState load_checkpoint(const ShardStore& store, Session& session) {
  require_same_model(store, session);
  const RunMetadata run = run_metadata_of(store);
  Exec& ex = session.memory.exec;
  load_values(
      session,
      [&](const ParamSpec& spec, const Box& box, TensorView out) { store.read_best(spec.name, box, out); },
      [&](const ParamSpec& spec) {
        return store.tensors().contains({spec.name, "weight"});
      });
  for (const OwnedSlice& slice : session.optimizer.slices())
    if (store.tensors().contains({slice.param->spec.name, "m"}))  // else frozen when it was saved: zero
      read_moments(ex, store, slice);
  std::map<std::string, std::int64_t> begun = moments_that_begin(store, session, run.step);
  // But for those that were frozen once more since.
  begun.insert(run.moments_begun.begin(), run.moments_begun.end());
  session.optimizer.begin_moments(begun);
  if (session.mesh.rank() == 0) warn_of_rounding(store, session);
  return {run.step,
          run.samples,
          run.source,
          run.source_digest.value_or(""),
          run.data_fingerprint,
          run.teacher_digest.value_or(""),
          std::move(begun)};
}

}  // namespace upmoe
