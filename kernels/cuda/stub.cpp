// The CUDA backend of a build without CUDA: every function fails and says so.

#include "kernels/core/gpu.h"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

[[noreturn]] void refuse(const char* op) {
  fail(ExitCode::kDevice,
       "{}: device: cuda was asked for, but this program was built without CUDA; use device: cpu", op);
}

}  // namespace

void gemm(Exec&, TensorView, ConstTensorView, Transpose, ConstTensorView, Transpose, Accumulate,
          const ConstTensorView*) {
  refuse("gemm");
}
void bias_backward(Exec&, TensorView, ConstTensorView) {
  refuse("bias_backward");
}
void grouped_gemm_forward(Exec&, TensorView, ConstTensorView, ConstTensorView, const ExpertRows&) {
  refuse("grouped_gemm_forward");
}
void grouped_gemm_dgrad(Exec&, TensorView, ConstTensorView, ConstTensorView, const ExpertRows&) {
  refuse("grouped_gemm_dgrad");
}
void grouped_gemm_wgrad(Exec&, TensorView, ConstTensorView, ConstTensorView, const ExpertRows&, Accumulate) {
  refuse("grouped_gemm_wgrad");
}
void rms_norm_forward(Exec&, TensorView, TensorView, ConstTensorView, ConstTensorView, float) {
  refuse("rms_norm_forward");
}
void add_rms_norm_forward(Exec&, TensorView, TensorView, TensorView, ConstTensorView, ConstTensorView,
                          ConstTensorView, float) {
  refuse("add_rms_norm_forward");
}
void rms_norm_backward(Exec&, TensorView, TensorView, ConstTensorView, ConstTensorView, ConstTensorView,
                       ConstTensorView, Accumulate) {
  refuse("rms_norm_backward");
}
void rope(Exec&, TensorView, ConstTensorView, AttentionShape, double, bool) {
  refuse("rope");
}
void attention_forward(Exec&, TensorView, TensorView, ConstTensorView, AttentionShape,
                       const ConstTensorView*) {
  refuse("attention_forward");
}
void attention_backward(Exec&, TensorView, ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView,
                        AttentionShape, const ConstTensorView*) {
  refuse("attention_backward");
}
void attention_pair_forward(Exec&, TensorView, TensorView, ConstTensorView, ConstTensorView, AttentionShape,
                            Visible, const ConstTensorView*, const ConstTensorView*) {
  refuse("attention_pair_forward");
}
void attention_merge(Exec&, TensorView, TensorView, ConstTensorView, ConstTensorView) {
  refuse("attention_merge");
}
void attention_pair_backward(Exec&, TensorView, TensorView, ConstTensorView, ConstTensorView, ConstTensorView,
                             ConstTensorView, ConstTensorView, AttentionShape, Visible,
                             const ConstTensorView*, const ConstTensorView*) {
  refuse("attention_pair_backward");
}
void copy_columns(Exec&, TensorView, std::int64_t, ConstTensorView, std::int64_t, std::int64_t) {
  refuse("copy_columns");
}
void swiglu_forward(Exec&, TensorView, ConstTensorView, const ConstTensorView*) {
  refuse("swiglu_forward");
}
void swiglu_backward(Exec&, TensorView, const TensorView*, ConstTensorView, ConstTensorView,
                     const ConstTensorView*) {
  refuse("swiglu_backward");
}
void sigmoid_gate_forward(Exec&, TensorView, ConstTensorView, ConstTensorView) {
  refuse("sigmoid_gate_forward");
}
void sigmoid_gate_backward(Exec&, TensorView, TensorView, ConstTensorView, ConstTensorView, ConstTensorView,
                           ConstTensorView) {
  refuse("sigmoid_gate_backward");
}
void embedding_forward(Exec&, TensorView, ConstTensorView, ConstTensorView, VocabShard) {
  refuse("embedding_forward");
}
void embedding_backward(Exec&, TensorView, ConstTensorView, ConstTensorView, VocabShard) {
  refuse("embedding_backward");
}
void cross_entropy(Exec&, TensorView, const TensorView*, ConstTensorView, ConstTensorView, float) {
  refuse("cross_entropy");
}
void cross_entropy_stats(Exec&, TensorView, ConstTensorView, ConstTensorView, VocabShard) {
  refuse("cross_entropy_stats");
}
void cross_entropy_sharded(Exec&, TensorView, const TensorView*, ConstTensorView, ConstTensorView,
                           ConstTensorView, float, VocabShard) {
  refuse("cross_entropy_sharded");
}
void route_tokens(Exec&, TensorView, TensorView, TensorView, TensorView, ConstTensorView, bool) {
  refuse("route_tokens");
}
void route_tokens_backward(Exec&, TensorView, ConstTensorView, ConstTensorView, float, ConstTensorView,
                           ConstTensorView, ConstTensorView, ConstTensorView, bool) {
  refuse("route_tokens_backward");
}
void balance_stats(Exec&, TensorView, TensorView, ConstTensorView, ConstTensorView, ConstTensorView) {
  refuse("balance_stats");
}
void expand_choices(Exec&, TensorView, ConstTensorView, ConstTensorView) {
  refuse("expand_choices");
}
void sort_by_expert(Exec&, TensorView, TensorView, TensorView, ConstTensorView) {
  refuse("sort_by_expert");
}
void regroup_runs(Exec&, TensorView, TensorView, std::span<const std::int64_t>,
                  std::span<const std::int64_t>) {
  refuse("regroup_runs");
}
void group_by_node(Exec&, TensorView, TensorView, TensorView, ConstTensorView,
                   std::span<const std::int64_t>) {
  refuse("group_by_node");
}
void node_choices(Exec&, TensorView, TensorView, ConstTensorView, std::span<const std::int64_t>,
                  ConstTensorView, ConstTensorView, std::span<const std::int64_t>) {
  refuse("node_choices");
}
void gather_rows(Exec&, TensorView, ConstTensorView, ConstTensorView, std::int64_t) {
  refuse("gather_rows");
}
void gather_sum_rows(Exec&, TensorView, ConstTensorView, ConstTensorView, Accumulate) {
  refuse("gather_sum_rows");
}
void fill(Exec&, TensorView, float) {
  refuse("fill");
}
void cast(Exec&, TensorView, ConstTensorView) {
  refuse("cast");
}
void add(Exec&, TensorView, ConstTensorView, ConstTensorView) {
  refuse("add");
}
void scale(Exec&, TensorView, float) {
  refuse("scale");
}
void sum_of_squares(Exec&, TensorView, std::span<const ConstTensorView>) {
  refuse("sum_of_squares");
}
void sum(Exec&, TensorView, ConstTensorView) {
  refuse("sum");
}
void adamw(Exec&, TensorView, TensorView, TensorView, TensorView, ConstTensorView, const AdamWStep&) {
  refuse("adamw");
}
void adamw8bit(Exec&, TensorView, const CodedMoments&, ConstTensorView, const AdamWStep&, const Chance&) {
  refuse("adamw8bit");
}
void encode_moments(Exec&, const CodedMoments&, ConstTensorView, ConstTensorView) {
  refuse("encode_moments");
}
void decode_moments(Exec&, TensorView, TensorView, const CodedMoments&) {
  refuse("decode_moments");
}

void download(Exec&, TensorView, ConstTensorView) {
  refuse("download");
}
void upload(Exec&, TensorView, ConstTensorView) {
  refuse("upload");
}

}  // namespace upmoe::cuda

namespace upmoe::gpu {

namespace {

[[noreturn]] void refuse() {
  fail(ExitCode::kDevice, "device: cuda was asked for, but {}; use device: cpu", why_none());
}

}  // namespace

bool is_built() {
  return false;
}
int count() {
  return 0;
}
std::string why_none() {
  return "this program was built without CUDA";
}
std::string name_of(int) {
  refuse();
}
std::string pci_id(int) {
  refuse();
}
void use(int) {
  refuse();
}
int current() {
  refuse();
}
void copy(Stream&, std::byte*, const std::byte*, std::size_t) {
  refuse();
}
void* raw(Stream&) {
  refuse();
}
Event::Event(bool) {
  refuse();
}
Event::~Event() = default;
void Event::record(Stream&) {
  refuse();
}
void Event::hold(Stream&) const {
  refuse();
}
bool Event::has_passed() const {
  refuse();
}
double Event::seconds_since(const Event&) const {
  refuse();
}
void fold_slices(Stream&, ReduceOp, DType, std::byte*, const std::byte*, const std::byte*, int, int,
                 std::int64_t) {
  refuse();
}
std::unique_ptr<Stream> make_stream() {
  refuse();
}
std::byte* allocate(std::size_t, std::string_view) {
  refuse();
}
void release(std::byte*) noexcept {}
std::byte* allocate_on_host(std::size_t, std::string_view) {
  refuse();
}
void release_on_host(std::byte*) noexcept {}
Reservation::Reservation(std::size_t, std::string_view) {
  refuse();
}
Reservation::~Reservation() = default;
void Reservation::commit(std::size_t) {
  refuse();
}

}  // namespace upmoe::gpu
