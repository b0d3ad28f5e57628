#include "trainer/checkpoint.h"

#include <atomic>
#include <nlohmann/json.hpp>

#include "kernels/core/log.h"
#include "kernels/ops/transfer.h"

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
  const std::int64_t tokens = state.samples * s.run.data.seq_len;
  return nlohmann::json{{"step", state.step},
                        {"samples", state.samples},
                        {"tokens", tokens},
                        {"config", to_yaml(s.run)},
                        {"model_config", to_hf_json(s.config)},
                        {"source", state.source},
                        {"mesh", s.mesh.spec().str()},
                        {"data_fingerprint", state.fingerprint}}
      .dump();
}

std::size_t aligned(std::size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

TensorView owned_weight(const StoredParam& p) {
  return p.value.reshape({p.value.elements()}).rows(p.owned.begin, p.owned.end);
}

std::size_t bytes_to_stage(const Session& s) {
  std::size_t bytes = 0;
  for (const StoredParam& p : s.params.all())
    if (p.owned.size() > 0) bytes += aligned(owned_weight(p).bytes());
  for (const OwnedSlice& slice : s.optimizer.slices())
    bytes += (slice.has_master() ? 3 : 2) *
             aligned(static_cast<std::size_t>(slice.weight.elements()) * sizeof(float));
  return bytes;
}

}  // namespace

CheckpointWriter::CheckpointWriter(fs::path checkpoints_dir, int keep)
    : dir_(std::move(checkpoints_dir)), keep_(keep) {}

CheckpointWriter::~CheckpointWriter() {
  if (thread_.joinable()) thread_.join();
}

void CheckpointWriter::begin(Session& session, const TrainState& state, Communicator& world,
                             bool in_background) {
  UPMOE_CHECK(!busy(), "one checkpoint at a time");
  Exec& ex = session.memory.exec;
  auto staged = std::make_unique<Staged>();
  staged->bytes = bytes_to_stage(session);
  staged->memory = Buffer::allocate({}, staged->bytes);
  std::size_t at = 0;
  const auto stage = [&](const StoredParam& p, const char* kind, DType dtype) {
    StorePiece piece;
    piece.tensor = p.spec.name;
    piece.kind = kind;
    piece.global = p.spec.shape;
    piece.boxes = flat_range_to_boxes(p.shard, p.owned);
    const TensorView room{staged->memory.data() + at, {p.owned.size()}, dtype, {}};
    piece.values = room;
    at += aligned(room.bytes());
    staged->pieces.push_back(std::move(piece));
    return room;
  };
  for (const StoredParam& p : session.params.all())
    if (p.owned.size() > 0) ops::download(ex, stage(p, "weight", p.value.dtype), owned_weight(p));
  for (const OwnedSlice& slice : session.optimizer.slices()) {
    if (slice.has_master()) ops::download(ex, stage(*slice.param, "master", DType::kF32), slice.master);
    const TensorView m = stage(*slice.param, "m", DType::kF32), v = stage(*slice.param, "v", DType::kF32);
    save_moments(ex, slice, m, v);
  }
  target_ = dir_ / fmt::format("step_{:08}", state.step);
  metadata_ = metadata_of(session, state);
  writer_ = std::make_unique<StoreWriter>(target_, world, staged->bytes);
  staged_ = std::move(staged);
  written_ = false;
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

fs::path CheckpointWriter::finish(Communicator& world) {
  UPMOE_CHECK(busy(), "no checkpoint under way");
  if (thread_.joinable()) thread_.join();
  const std::unique_ptr<StoreWriter> writer = std::move(writer_);
  const std::unique_ptr<Staged> staged = std::move(staged_);
  writer->commit(world, metadata_);
  retire_old(world);
  return target_;
}

// Renames first, so that a folder that is being deleted is never taken for a checkpoint. Failing only warns.
void CheckpointWriter::retire_old(Communicator& world) const {
  if (world.rank() != 0) return;
  const std::vector<fs::path> all = list_checkpoints(dir_);
  for (std::size_t i = 0; i + static_cast<std::size_t>(keep_) < all.size(); ++i) {
    fs::path doomed = all[i];
    doomed += ".old";
    std::error_code error;
    fs::rename(all[i], doomed, error);
    if (!error) fs::remove_all(doomed, error);
    if (error) log::warning("checkpoint {}: could not be removed: {}", all[i].string(), error.message());
  }
}

namespace {

void require_same_model(const ShardStore& store, const Session& session) {
  std::string differences;
  const auto& stored = store.tensors();
  for (const StoredParam& p : session.params.all()) {
    const auto it = stored.find({p.spec.name, "weight"});
    if (it == stored.end()) {
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

// What the slice owns, read into `out` on the host.
void read_flat(const ShardStore& store, const OwnedSlice& slice, const char* kind, TensorView out) {
  std::int64_t at = 0;
  for (const Box& box : flat_range_to_boxes(slice.param->shard, slice.param->owned)) {
    store.read(slice.param->spec.name, kind, box, out.rows(at, at + box.elements()));
    at += box.elements();
  }
}

void read_moments(Exec& ex, const ShardStore& store, const OwnedSlice& slice) {
  const Shape shape{slice.weight.elements()};
  const Buffer memory = Buffer::allocate({}, 2 * static_cast<std::size_t>(shape.elements()) * sizeof(float));
  const TensorView both = memory.view({2 * shape[0]}, DType::kF32), m = both.rows(0, shape[0]),
                   v = both.rows(shape[0], 2 * shape[0]);
  read_flat(store, slice, "m", m);
  read_flat(store, slice, "v", v);
  load_moments(ex, slice, m, v);
}

}  // namespace

TrainState load_checkpoint(const ShardStore& store, Session& session) {
  require_same_model(store, session);
  const auto meta = nlohmann::json::parse(store.metadata_json());
  Exec& ex = session.memory.exec;
  session.params.load(ex, [&](const ParamSpec& spec, const Box& box, TensorView out) {
    store.read(spec.name, "weight", box, out);
  });
  session.optimizer.reset(ex);  // masters from weights; the stored ones replace them where they exist
  for (const OwnedSlice& slice : session.optimizer.slices()) {
    const std::string& name = slice.param->spec.name;
    if (!store.tensors().contains({name, "m"}))
      continue;  // frozen when it was saved: its moments start at zero
    read_moments(ex, store, slice);
    if (slice.has_master() && store.tensors().contains({name, "master"}))
      ops::write_through_host(ex, slice.master,
                              [&](TensorView out) { read_flat(store, slice, "master", out); });
  }
  TrainState state;
  state.step = meta.at("step").get<std::int64_t>();
  state.samples = meta.at("samples").get<std::int64_t>();
  state.source = meta.at("source").get<std::string>();
  state.fingerprint = meta.at("data_fingerprint").get<std::string>();
  return state;
}

std::optional<fs::path> newest_usable(const fs::path& checkpoints_dir, Communicator& world) {
  std::vector<fs::path> all;
  std::int64_t count = 0;
  run_agreed(world, [&] {
    if (world.rank() == 0) all = list_checkpoints(checkpoints_dir);
    count = static_cast<std::int64_t>(all.size());
  });
  std::int64_t chosen = -1;
  if (world.rank() == 0) {
    for (std::int64_t i = count - 1; i >= 0 && chosen < 0; --i) {
      const fs::path& dir = all[static_cast<std::size_t>(i)];
      try {
        ShardStore(dir).verify();
        chosen = std::stoll(dir.filename().string().substr(5));
      } catch (const Error& e) {
        log::warning("checkpoint {} is not usable and is passed over: {}", dir.string(), e.what());
      }
    }
  }
  world.broadcast(host_view(&chosen, {1}), 0);
  if (chosen < 0) return std::nullopt;
  return checkpoints_dir / fmt::format("step_{:08}", chosen);
}

}  // namespace upmoe
