#pragma once
// The one switch from a checked op entry to a backend.

#include <concepts>
#include <span>
#include <type_traits>

#include "kernels/ops/backend.h"

namespace upmoe {

// What an op reads and writes, argument by argument, for who watches it. An argument of another kind does not compile:
// it says here what it holds.
inline void show(OpWatcher& w, const TensorView& t) {
  if (t.given()) w.writes(t);
}
inline void show(OpWatcher& w, const ConstTensorView& t) {
  if (t.given()) w.reads(t);
}
inline void show(OpWatcher& w, std::span<const ConstTensorView> parts) {
  for (const ConstTensorView& t : parts) w.reads(t);
}
inline void show(OpWatcher& w, std::span<const TensorView> parts) {
  for (const TensorView& t : parts) w.writes(t);
}
inline void show(OpWatcher& w, const ExpertRows& rows) {
  w.reads(rows.offset_e1);
}
inline void show(OpWatcher& w, const ops::PickedRows& rows) {
  for (const ConstTensorView& t : {rows.from_XD, rows.index_R}) show(w, t);
}
inline void show(OpWatcher& w, const ops::ExpertFfn& f) {
  for (const ConstTensorView& t : {f.gate_up_eGD, f.down_eDF, f.weight_R, f.rows.offset_e1}) w.reads(t);
}
inline void show(OpWatcher& w, const ops::HiddenGradients& g) {
  for (const TensorView& t : {g.dgate_up_RG, g.h_RF, g.dweight_R}) w.writes(t);
}
inline void show(OpWatcher& w, const Factor& factor) {
  w.reads(factor.stored);
}
inline void show(OpWatcher& w, const NormWeight& weight) {
  w.reads(weight.w_D);
}
inline void show(OpWatcher& w, const NormedRows& rows) {
  for (const ConstTensorView& t : {rows.x_TD, rows.rstd_T}) w.reads(t);
}
inline void show(OpWatcher& w, const RowMoments& moments) {
  for (const TensorView& t : {moments.mean_T, moments.rstd_T}) w.writes(t);
}
inline void show(OpWatcher& w, const CentredRows& rows) {
  for (const ConstTensorView& t : {rows.x_TD, rows.mean_T, rows.rstd_T}) w.reads(t);
}
inline void show(OpWatcher& w, const QkWeights& weights) {
  for (const ConstTensorView& t : {weights.q_d, weights.k_d}) w.reads(t);
}
inline void show(OpWatcher& w, const QkWeightGradients& dw) {
  for (const TensorView& t : {dw.q_d, dw.k_d}) w.writes(t);
}
inline void show(OpWatcher& w, const Attended& saved) {
  for (const ConstTensorView& t : {saved.out_TQ, saved.lse_TN}) w.reads(t);
}
inline void show(OpWatcher& w, const ChunkPair& pair) {
  for (const ConstTensorView& t : {pair.document_T, pair.key_document_T}) show(w, t);
}
inline void show(OpWatcher& w, const ChunkPairGradients& g) {
  for (const TensorView& t : {g.dq_TQ, g.dkv_TK}) w.writes(t);
}
inline void show(OpWatcher& w, const KeyCache& cache) {
  for (const TensorView& t : {cache.k_BSK, cache.v_BSK}) w.writes(t);
}
inline void show(OpWatcher& w, const CachedTokens& tokens) {
  for (const ConstTensorView& t : {tokens.row_T, tokens.position_T}) w.reads(t);
}
inline void show(OpWatcher& w, const TokenLosses& out) {
  for (const TensorView& t : {out.loss_C, out.dlogits_CV}) show(w, t);
}
inline void show(OpWatcher& w, const DistilledRows& rows) {
  for (const ConstTensorView& t : {rows.logits_CV, rows.teacher_CV, rows.targets_C}) w.reads(t);
}
inline void show(OpWatcher& w, const DistilledLosses& out) {
  for (const TensorView& t : {out.loss_C, out.divergence_C, out.dlogits_CV}) show(w, t);
}
inline void show(OpWatcher& w, const Routes& r) {
  for (const ConstTensorView& t : {r.probs_TE, r.index_TK, r.weight_TK, r.lse_T}) w.reads(t);
}
inline void show(OpWatcher& w, const TermGradient& terms) {
  for (const ConstTensorView& t : {terms.aux, terms.row_T}) show(w, t);
}
inline void show(OpWatcher& w, const SigmoidRoutes& r) {
  for (const TensorView& t : {r.probs_TE, r.index_TK, r.weight_TK, r.lse_T}) w.writes(t);
}
inline void show(OpWatcher& w, const SigmoidSaved& s) {
  for (const ConstTensorView& t : {s.logits_TE, s.index_TK, s.lse_T}) w.reads(t);
}
inline void show(OpWatcher& w, const PooledChoices& c) {
  for (const ConstTensorView& t : {c.index_NK, c.weight_NK, c.row_N}) show(w, t);
}
inline void show(OpWatcher& w, const TokenDraws& draws) {
  w.reads(draws.place_T);
}
inline void show(OpWatcher& w, const TokenGroups& groups) {
  w.reads(groups.row_N);
}
inline void show(OpWatcher& w, const GroupsHere& here) {
  w.reads(here.groups.row_N);
}
inline void show(OpWatcher& w, const NoisyLogits& r) {
  for (const ConstTensorView& t : {r.logits_TE, r.scale_TE, r.noisy_TE, r.index_TK}) w.reads(t);
}
inline void show(OpWatcher& w, const NoisyGradient& g) {
  for (const ConstTensorView& t : {g.dnoisy_TE, g.dload_E}) show(w, t);
}
inline void show(OpWatcher& w, const SumOnto& onto) {
  for (const ConstTensorView& t :
       {onto.base_TD, onto.gate.dgate_T, onto.gate.gate_T, onto.gate.w_1D, onto.residual_TD})
    show(w, t);
}
inline void show(OpWatcher& w, const NodeRows& rows) {
  w.reads(rows.order_X);
}
inline void show(OpWatcher& w, const BalanceCounts& counts) {
  for (const ConstTensorView& t : {counts.loads_ML, counts.pool_2E, counts.previous_ME}) show(w, t);
}
inline void show(OpWatcher& w, const BalanceGradients& g) {
  for (const TensorView& t : {g.probability_ME, g.weight_ME, g.chance_ME}) show(w, t);
}
inline void show(OpWatcher& w, const CodedMoments& moments) {
  for (const TensorView& t : {moments.m_n, moments.v_n, moments.m_scale_b, moments.v_scale_b}) w.writes(t);
}
template <class T>
concept HoldsNoTensor = std::is_arithmetic_v<T> || std::is_enum_v<T> || std::same_as<T, AttentionShape> ||
    std::same_as<T, VocabShard> || std::same_as<T, AdamWStep> || std::same_as<T, Chance> ||
    std::same_as<T, SigmoidRule> || std::same_as<T, CapacityRule> || std::same_as<T, GroupCapacity> ||
    std::same_as<T, BalanceRule> || std::same_as<T, PackedParts> || std::same_as<T, Distillation> ||
    std::same_as<T, std::span<const std::int64_t>>;  // on the host
template <HoldsNoTensor T>
void show(OpWatcher&, const T&) {}

}  // namespace upmoe

namespace upmoe::ops {

// `op` of the backend of ex's device: dispatch(ex, &Backend::add, out, a, b).
template <class Op, class... Args>
void dispatch(Exec& ex, Op Backend::*op, const Args&... args) {
  if (ex.watcher != nullptr) [[unlikely]]
    (show(*ex.watcher, args), ...);
  switch (ex.device.type) {
    case DeviceType::kCpu:
      if (ex.stream != nullptr) ex.stream->poll();
      return (cpu::backend().*op)(ex, args...);
    case DeviceType::kCuda:
      return (cuda::backend().*op)(ex, args...);
    case DeviceType::kDry:
      return;  // checked and booked, not computed
  }
}

}  // namespace upmoe::ops
