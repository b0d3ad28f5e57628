#include "kernels/cuda/library/cudnn_sdpa.h"

#include <cudnn_frontend.h>

#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <unordered_map>

#include "kernels/cuda/library/sdpa_slices.h"
#include "kernels/cuda/runtime/stream.cuh"

namespace upmoe::cuda {

namespace {

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;

void check_cudnn(cudnnStatus_t status, const char* call) {
  if (status != CUDNN_STATUS_SUCCESS)
    fail(ExitCode::kDevice, "cuDNN: {} (in {})", cudnnGetErrorString(status), call);
}

// Which memory is which, for the plan.
enum Uid : std::int64_t {
  kQ = 1,
  kK,
  kV,
  kO,
  kStats,
  kDO,
  kDQ,
  kDK,
  kDV,
  kQkvOffset,
  kOutOffset,
  kQuerySize,
  kKeySize
};

struct Plan {
  fe::graph::Graph graph;
  std::int64_t workspace = 0;
  std::string refusal;  // in cuDNN's words; empty: it computes
};

// Of a slice of sequences and heads, whose rows are those of all heads. `ragged`: documents, each with an offset and a
// size of its own, seq_len at most.
struct Key {
  std::int64_t heads, kv_heads, head_dim, seq_len, sequences;
  std::int64_t all_heads, all_kv_heads, window;
  bool ragged, backward, deterministic;
  friend auto operator<=>(const Key&, const Key&) = default;
};

// Kept by a stream (CudaStream::kept).
class SdpaLibrary {
 public:
  explicit SdpaLibrary(const CudaStream& stream) {
    check_cudnn(cudnnCreate(&handle_), "cudnnCreate");
    check_cudnn(cudnnSetStream(handle_, stream.raw()), "cudnnSetStream");
  }
  ~SdpaLibrary() { cudnnDestroy(handle_); }
  SdpaLibrary(const SdpaLibrary&) = delete;

  // A refusal is kept like a plan: cuDNN is asked once for each shape, and the portable kernels compute what it does
  // not take.
  Plan& plan(const Key& key) {
    std::unique_ptr<Plan>& known = plans_[key];
    if (known != nullptr) return *known;
    auto plan = std::make_unique<Plan>();
    describe(plan->graph, key);
    fe::error_t built = plan->graph.build(handle_, {fe::HeurMode_t::A});
    if (built.is_good()) built = plan->graph.get_workspace_size(plan->workspace);
    if (!built.is_good()) plan->refusal = built.get_message();
    known = std::move(plan);
    return *known;
  }

  static std::string refusal(const Key& key, int sm) {
    fe::graph::Graph graph;
    graph.set_sm_version(sm);
    describe(graph, key);
    fe::error_t validated = graph.validate();
    return validated.is_good() ? "" : validated.get_message();
  }

  void run(Exec& ex, const Key& key, std::unordered_map<std::int64_t, void*> memory) {
    Plan& p = plan(key);
    UPMOE_CHECK(p.refusal.empty(), "cuDNN refused this attention before: {}", p.refusal);
    ScratchScope scope(*ex.scratch);
    const TensorView workspace = ex.scratch->take({p.workspace}, DType::kU8, "cuDNN's attention");
    fe::error_t done = p.graph.execute(handle_, memory, workspace.data);
    if (!done.is_good()) fail(ExitCode::kDevice, "cuDNN: attention: {}", done.get_message());
  }

 private:
  // What a ragged tensor's sequences have on the device: where their rows begin, in elements from the tensor's own
  // address, and how many tokens they have.
  struct Ragged {
    std::shared_ptr<Tensor_attributes> qkv_offset, out_offset, query_size, key_size;
  };
  static std::shared_ptr<Tensor_attributes> integers(fe::graph::Graph& graph, const char* name, Uid uid,
                                                     std::int64_t n) {
    return graph.tensor(Tensor_attributes()
                            .set_name(name)
                            .set_uid(uid)
                            .set_data_type(fe::DataType_t::INT32)
                            .set_dim({n, 1, 1, 1})
                            .set_stride({1, 1, 1, 1}));
  }
  static Ragged ragged(fe::graph::Graph& graph, const Key& key) {
    if (!key.ragged) return {};
    return {integers(graph, "offsets of qkv", kQkvOffset, key.sequences + 1),
            integers(graph, "offsets of out", kOutOffset, key.sequences + 1),
            integers(graph, "sizes of queries", kQuerySize, key.sequences),
            integers(graph, "sizes of keys", kKeySize, key.sequences)};
  }

  // q, k and v are three views of one matrix with its row as stride, so nothing is copied or transposed for cuDNN.
  // A row of qkv_TH holds all query heads, then the key heads, then the value heads.
  struct Rows {
    const Key& key;
    std::int64_t row;                           // elements
    std::shared_ptr<Tensor_attributes> offset;  // null: one sequence behind the other
    void describe(Tensor_attributes& t, Uid uid, std::int64_t heads) const {
      t.set_uid(uid)
          .set_data_type(fe::DataType_t::BFLOAT16)
          .set_dim({key.sequences, heads, key.seq_len, key.head_dim})
          .set_stride({key.seq_len * row, key.head_dim, row, 1});
      if (offset != nullptr) t.set_ragged_offset(offset);
    }
    std::shared_ptr<Tensor_attributes> in(fe::graph::Graph& graph, const char* name, Uid uid,
                                          std::int64_t heads) const {
      Tensor_attributes t;
      t.set_name(name);
      describe(t, uid, heads);
      return graph.tensor(t);
    }
    void out(const std::shared_ptr<Tensor_attributes>& t, Uid uid, std::int64_t heads) const {
      t->set_output(true);
      describe(*t, uid, heads);
    }
  };
  static Tensor_attributes stats(const Key& key) {
    return Tensor_attributes()
        .set_name("stats")
        .set_uid(kStats)
        .set_data_type(fe::DataType_t::FLOAT)
        .set_dim({key.sequences, key.heads, key.seq_len, 1})
        .set_stride({key.heads * key.seq_len, key.seq_len, 1, 1});
  }

  // A left bound of W keeps column + W > row, the keys j with i - W < j.
  template <class Options>
  static void set_masks(Options& options, const Key& key, const Ragged& sizes) {
    options.set_causal_mask(true);
    if (key.ragged)
      options.set_padding_mask(true).set_seq_len_q(sizes.query_size).set_seq_len_kv(sizes.key_size);
    if (key.window > 0) options.set_diagonal_band_left_bound(static_cast<int>(key.window));
  }

  static void describe(fe::graph::Graph& graph, const Key& key) {
    const std::int64_t qkv_row = (key.all_heads + 2 * key.all_kv_heads) * key.head_dim,
                       out_row = key.all_heads * key.head_dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(key.head_dim));
    graph.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const Ragged documents = ragged(graph, key);
    const Rows of_qkv{key, qkv_row, documents.qkv_offset}, of_out{key, out_row, documents.out_offset};
    const auto q = of_qkv.in(graph, "q", kQ, key.heads), k = of_qkv.in(graph, "k", kK, key.kv_heads),
               v = of_qkv.in(graph, "v", kV, key.kv_heads);
    if (!key.backward) {
      auto options = fe::graph::SDPA_attributes().set_name("attention");
      options.set_generate_stats(true).set_attn_scale(scale);
      set_masks(options, key, documents);
      const auto [out, row_stats] = graph.sdpa(q, k, v, options);
      of_out.out(out, kO, key.heads);
      row_stats->set_output(true).set_uid(kStats).set_data_type(fe::DataType_t::FLOAT);
      return;
    }
    const auto out = of_out.in(graph, "out", kO, key.heads), dout = of_out.in(graph, "dout", kDO, key.heads),
               row_stats = graph.tensor(stats(key));
    auto options = fe::graph::SDPA_backward_attributes().set_name("attention_backward");
    options.set_attn_scale(scale).set_deterministic_algorithm(key.deterministic);
    set_masks(options, key, documents);
    const auto [dq, dk, dv] = graph.sdpa_backward(q, k, v, out, dout, row_stats, options);
    of_qkv.out(dq, kDQ, key.heads);
    of_qkv.out(dk, kDK, key.kv_heads);
    of_qkv.out(dv, kDV, key.kv_heads);
  }

  cudnnHandle_t handle_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

SdpaSlice whole(const AttentionShape& s, std::int64_t tokens) {
  return {0, tokens / s.seq_len, 0, s.kv_heads};
}

std::int64_t most_workspace = std::int64_t{2} << 30;

std::vector<SdpaSlice> slices_of(const AttentionShape& s, std::int64_t tokens, bool deterministic) {
  if (!deterministic) return {whole(s, tokens)};
  return backward_slices(s, tokens, most_workspace);
}

Key key_of(const AttentionShape& s, const SdpaSlice& slice, bool backward, bool deterministic) {
  const std::int64_t window = s.window < s.seq_len ? s.window : 0;  // none that reaches the first token
  // Of heads all, also where cuDNN is to refuse their number.
  return {.heads = s.heads * slice.kv_heads / s.kv_heads,
          .kv_heads = slice.kv_heads,
          .head_dim = s.head_dim,
          .seq_len = s.seq_len,
          .sequences = slice.sequences,
          .all_heads = s.heads,
          .all_kv_heads = s.kv_heads,
          .window = window,
          .ragged = false,
          .backward = backward,
          .deterministic = backward && deterministic};
}

Key key_of(AttentionShape s, const DocumentSlice& slice, bool backward, bool deterministic) {
  s.seq_len = slice.length;
  Key key =
      key_of(s, SdpaSlice{0, slice.batch, slice.first_kv_head, slice.kv_heads}, backward, deterministic);
  key.ragged = true;
  return key;
}

std::int64_t most_of(bool backward, bool deterministic) {
  return backward && deterministic ? most_workspace : 0;
}

// All plans that one pass of attention needs.
std::vector<Key> keys_of(const AttentionShape& s, std::int64_t tokens, bool backward, bool deterministic) {
  std::vector<Key> keys;
  for (const DocumentSlice& slice : document_slices(s, most_of(backward, deterministic)))
    keys.push_back(key_of(s, slice, backward, deterministic));
  if (!keys.empty()) return keys;
  if (!backward) return {key_of(s, whole(s, tokens), false, deterministic)};
  for (const SdpaSlice& slice : slices_of(s, tokens, deterministic))
    keys.push_back(key_of(s, slice, true, deterministic));
  return keys;
}

// Where a slice begins in memory. cuDNN takes no const; inputs stay as they are.
struct SliceMemory {
  const AttentionShape& s;
  const SdpaSlice& slice;

  // The head `head` of matrices whose rows are `row` heads wide.
  void* rows(const void* matrix, std::int64_t row, std::int64_t head) const {
    const std::int64_t elements = (slice.first_sequence * s.seq_len * row + head) * s.head_dim;
    return static_cast<std::byte*>(const_cast<void*>(matrix)) + elements * std::int64_t{sizeof(bf16)};
  }
  std::int64_t first_head() const { return s.heads / s.kv_heads * slice.first_kv_head; }
  void* out(const ConstTensorView& out_TQ) const { return rows(out_TQ.data, s.heads, first_head()); }
  void* stats(const ConstTensorView& stats_BHS) const {
    const std::int64_t elements = (slice.first_sequence * s.heads + first_head()) * s.seq_len;
    return const_cast<std::byte*>(stats_BHS.data) + elements * std::int64_t{sizeof(float)};
  }
  // The three parts of a matrix in qkv's layout.
  void add_parts(std::unordered_map<std::int64_t, void*>& memory, std::array<Uid, 3> uids,
                 const void* qkv) const {
    const std::int64_t row = s.heads + 2 * s.kv_heads;
    memory[uids[0]] = rows(qkv, row, first_head());
    memory[uids[1]] = rows(qkv, row, s.heads + slice.first_kv_head);
    memory[uids[2]] = rows(qkv, row, s.heads + s.kv_heads + slice.first_kv_head);
  }
};

}  // namespace

bool has_cudnn() {
  return true;
}

std::size_t cudnn_version() {
  return cudnnGetVersion();
}

std::int64_t sdpa_workspace() {
  return most_workspace;
}

void limit_sdpa_workspace(std::int64_t bytes) {
  most_workspace = bytes;
}

namespace {

// Offsets are 32 bits wide.
std::string too_long(const AttentionShape& s, std::int64_t tokens) {
  if (s.runs.empty() || tokens * s.qkv_width() <= std::numeric_limits<std::int32_t>::max()) return {};
  return fmt::format("{} tokens of {} elements have no offsets of 32 bits", tokens, s.qkv_width());
}

}  // namespace

std::string sdpa_refusal(const Exec& ex, const AttentionShape& shape, std::int64_t tokens) {
  auto& library = stream_of(ex).kept<SdpaLibrary>();
  std::string refusal = too_long(shape, tokens);
  for (const bool backward : {false, true})
    for (const Key& key : keys_of(shape, tokens, backward, ex.deterministic))
      if (refusal.empty()) refusal = library.plan(key).refusal;
  return refusal;
}

std::string sdpa_refusal(const AttentionShape& shape, std::int64_t tokens, bool backward, int sm) {
  std::string refusal = too_long(shape, tokens);
  for (const Key& key : keys_of(shape, tokens, backward, true))
    if (refusal.empty()) refusal = SdpaLibrary::refusal(key, sm);
  return refusal;
}

void sdpa_forward(Exec& ex, TensorView out_TQ, TensorView stats_BHS, ConstTensorView qkv_TH,
                  const AttentionShape& shape) {
  const SdpaSlice all = whole(shape, qkv_TH.shape[0]);
  const SliceMemory at{shape, all};
  std::unordered_map<std::int64_t, void*> memory{{kO, at.out(out_TQ)}, {kStats, at.stats(stats_BHS)}};
  at.add_parts(memory, {kQ, kK, kV}, qkv_TH.data);
  stream_of(ex).kept<SdpaLibrary>().run(ex, key_of(shape, all, false, true), memory);
}

void sdpa_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                   ConstTensorView out_TQ, ConstTensorView stats_BHS, const AttentionShape& shape) {
  for (const SdpaSlice& slice : slices_of(shape, qkv_TH.shape[0], ex.deterministic)) {
    const SliceMemory at{shape, slice};
    std::unordered_map<std::int64_t, void*> memory{
        {kO, at.out(out_TQ)}, {kDO, at.out(dout_TQ)}, {kStats, at.stats(stats_BHS)}};
    at.add_parts(memory, {kQ, kK, kV}, qkv_TH.data);
    at.add_parts(memory, {kDQ, kDK, kDV}, dqkv_TH.data);
    stream_of(ex).kept<SdpaLibrary>().run(ex, key_of(shape, slice, true, ex.deterministic), memory);
  }
}

namespace {

void add_table(std::unordered_map<std::int64_t, void*>& memory, const DocumentTable& table) {
  const auto place = [](const ConstTensorView& t) { return const_cast<std::byte*>(t.data); };
  memory[kQkvOffset] = place(table.qkv_offset_b1);
  memory[kOutOffset] = place(table.out_offset_b1);
  memory[kQuerySize] = memory[kKeySize] = place(table.size_b);
}

// Of the heads alone: the table says where the tokens are.
SdpaSlice heads_of(const DocumentSlice& slice) {
  return {0, slice.batch, slice.first_kv_head, slice.kv_heads};
}

}  // namespace

void sdpa_forward(Exec& ex, TensorView out_TQ, TensorView stats_BHS, ConstTensorView qkv_TH,
                  const AttentionShape& shape, const DocumentSlice& slice, const DocumentTable& table) {
  const SdpaSlice heads = heads_of(slice);
  const SliceMemory at{shape, heads};
  std::unordered_map<std::int64_t, void*> memory{{kO, at.out(out_TQ)}, {kStats, stats_BHS.data}};
  at.add_parts(memory, {kQ, kK, kV}, qkv_TH.data);
  add_table(memory, table);
  stream_of(ex).kept<SdpaLibrary>().run(ex, key_of(shape, slice, false, ex.deterministic), memory);
}

void sdpa_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, const SdpaSaved& saved,
                   const AttentionShape& shape, const DocumentSlice& slice, const DocumentTable& table) {
  const SdpaSlice heads = heads_of(slice);
  const SliceMemory at{shape, heads};
  std::unordered_map<std::int64_t, void*> memory{{kO, at.out(saved.out_TQ)},
                                                 {kDO, at.out(dout_TQ)},
                                                 {kStats, const_cast<std::byte*>(saved.stats_BHS.data)}};
  at.add_parts(memory, {kQ, kK, kV}, saved.qkv_TH.data);
  at.add_parts(memory, {kDQ, kDK, kDV}, dqkv_TH.data);
  add_table(memory, table);
  stream_of(ex).kept<SdpaLibrary>().run(ex, key_of(shape, slice, true, ex.deterministic), memory);
}

}  // namespace upmoe::cuda
