#include "trainer/model/context_ring.h"

#include <vector>

#include "kernels/ops/pointwise.h"
#include "trainer/model/context_shards.h"

namespace upmoe {

namespace {

constexpr int kMostHalves = 2;

// What forward and backward share: the rank's place, its chunks, and who holds which documents.
class Ring {
 public:
  Ring(Exec& ex, Communicator& cp, const AttentionShape& shape, std::int64_t tokens,
       ConstTensorView document_T)
      : ex_(ex), cp_(cp), chunk_(shape), context_{cp.rank(), cp.size(), shape.seq_len}, mine_(document_T) {
    UPMOE_CHECK(shape.seq_len > 0 && shape.seq_len % (context_.halves() * cp.size()) == 0 &&
                    tokens % (shape.seq_len / cp.size()) == 0,
                "{} tokens of sequences of {} on {} ranks", tokens, shape.seq_len, cp.size());
    chunk_.seq_len = context_.chunk_len();
    half_ = tokens / context_.halves();
    if (!mine_.given()) return;
    documents_PT_ = ex.scratch->take({cp.size(), tokens}, DType::kI32, "documents of all cp ranks");
    cp.all_gather(documents_PT_, mine_, ex).wait();
  }
  template <class View>
  View half(const View& v, int h) const {
    return v.rows(h * half_, (h + 1) * half_);
  }
  // Who made the keys and values that this rank holds at step s.
  int owner(int s) const { return (cp_.rank() + cp_.size() - s) % cp_.size(); }

  // work(query half, key half, the two) for each pair of chunks that is seen.
  template <class Work>
  void for_pairs(int owner, const Work& work) const {
    const auto halves = static_cast<int>(context_.halves());  // one, of whole sequences, on one rank
    for (int q = 0; q < halves; ++q)
      for (int k = 0; k < halves; ++k) {
        const int queries = context_.chunk_of(cp_.rank(), q), keys = context_.chunk_of(owner, k);
        if (keys > queries) continue;
        const std::int64_t ahead = (queries - keys) * chunk_.seq_len;
        if (passed(ahead)) continue;
        ChunkPair pair{
            .shape = chunk_, .visible = keys == queries ? Visible::kCausal : Visible::kAll, .ahead = ahead};
        if (mine_.given()) {
          pair.document_T = half(mine_, q);
          pair.key_document_T = half(documents_PT_.rows(owner, owner + 1).reshape(mine_.shape), k);
        }
        work(q, k, pair);
      }
  }
  // Keys and values go round the ring; rank r meets, step by step, those of r, r - 1, r - 2, ... With 3 ranks:
  //
  //   step    rank 0   rank 1   rank 2
  //    0        0        1        2         each works on its own while the next ones arrive
  //    1        2        0        1
  //    2        1        2        0
  //
  // Everything on this rank to the next one.
  Pending pass_on(TensorView out, ConstTensorView in) const {
    std::vector<std::int64_t> to(static_cast<std::size_t>(cp_.size())), from(to);
    to[static_cast<std::size_t>((cp_.rank() + 1) % cp_.size())] = in.rows();
    from[static_cast<std::size_t>((cp_.rank() + cp_.size() - 1) % cp_.size())] = out.rows();
    return cp_.all_to_all_rows(out, from, in, to, ex_);
  }

 private:
  // Whether the first query is already out of the last key's window, and so each of the others out of each key's.
  bool passed(std::int64_t ahead) const {
    return chunk_.window > 0 && ahead - (chunk_.seq_len - 1) >= chunk_.window;
  }

  Exec& ex_;
  Communicator& cp_;
  AttentionShape chunk_;
  ContextShards context_;
  std::int64_t half_ = 0;  // tokens
  ConstTensorView mine_;   // documents
  TensorView documents_PT_;
};

// Two buffers of keys and values: one to work on, one to receive into.
struct KeysValues {
  KeysValues(Exec& ex, const AttentionShape& shape, ConstTensorView qkv_TH) {
    for (TensorView& kv : buffer)
      kv = ex.scratch->take({qkv_TH.shape[0], shape.kv_width()}, qkv_TH.dtype, "keys and values in the ring");
    ops::copy_columns(ex, buffer[0], 0, qkv_TH, shape.heads * shape.head_dim, shape.kv_width());
  }
  TensorView buffer[2];
};

}  // namespace

void ring_attention_forward(Exec& ex, Communicator& cp, TensorView out_TQ, TensorView lse_TN,
                            ConstTensorView qkv_TH, AttentionShape shape, ConstTensorView document_T) {
  ScratchScope scope(*ex.scratch);
  const Ring ring(ex, cp, shape, qkv_TH.shape[0], document_T);
  KeysValues kv(ex, shape, qkv_TH);
  TensorView sum_TQ = ex.scratch->take(out_TQ.shape, DType::kF32, "attention output so far");
  TensorView part_TQ = ex.scratch->take(out_TQ.shape, DType::kF32, "attention output of a pair of chunks");
  TensorView part_TN = ex.scratch->take(lse_TN.shape, DType::kF32, "log-sum-exp of a pair of chunks");
  // The first pair that a half of the queries meets writes its sum; every further one is merged into it. Step 0 always
  // has one, the diagonal, so no query is left without.
  bool begun[kMostHalves] = {};
  for (int s = 0; s < cp.size(); ++s) {
    Pending next;
    if (s + 1 < cp.size()) next = ring.pass_on(kv.buffer[(s + 1) % 2], kv.buffer[s % 2]);
    ring.for_pairs(ring.owner(s), [&](int q, int k, const ChunkPair& pair) {
      TensorView out = ring.half(begun[q] ? part_TQ : sum_TQ, q),
                 lse = ring.half(begun[q] ? part_TN : lse_TN, q);
      ops::attention_pair_forward(ex, out, lse, ring.half(qkv_TH, q), ring.half(kv.buffer[s % 2], k), pair);
      if (begun[q]) ops::attention_merge(ex, ring.half(sum_TQ, q), ring.half(lse_TN, q), out, lse);
      begun[q] = true;
    });
    next.wait();
  }
  ops::cast(ex, out_TQ, sum_TQ);
}

void ring_attention_backward(Exec& ex, Communicator& cp, TensorView dqkv_TH, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, const Attended& saved, AttentionShape shape,
                             ConstTensorView document_T) {
  ScratchScope scope(*ex.scratch);
  const Ring ring(ex, cp, shape, qkv_TH.shape[0], document_T);
  KeysValues kv(ex, shape, qkv_TH);
  const Shape keys_values = kv.buffer[0].shape;
  TensorView dq_TQ = ex.scratch->take(dout_TQ.shape, DType::kF32, "query gradient");
  TensorView own_TK = ex.scratch->take(keys_values, DType::kF32, "key and value gradient of a step");
  // The gradients of keys and values travel with them, one hop behind: a rank adds its part to what the ranks before
  // have summed and passes it on. The last hop brings them home, complete, and in the same order of ranks on every run.
  TensorView sum_TK[2];  // of the ranks so far: one to add to, one on its way
  for (TensorView& sum : sum_TK)
    sum = ex.scratch->take(keys_values, DType::kF32, "key and value gradient in the ring");
  ops::fill(ex, dq_TQ, 0.0f);
  Pending hop;
  for (int s = 0; s < cp.size(); ++s) {
    Pending next;
    if (s + 1 < cp.size()) next = ring.pass_on(kv.buffer[(s + 1) % 2], kv.buffer[s % 2]);
    const TensorView step_TK = s == 0 ? sum_TK[0] : own_TK;
    ops::fill(ex, step_TK, 0.0f);
    ring.for_pairs(ring.owner(s), [&](int q, int k, const ChunkPair& pair) {
      ops::attention_pair_backward(ex, {ring.half(dq_TQ, q), ring.half(step_TK, k)}, ring.half(dout_TQ, q),
                                   ring.half(qkv_TH, q), ring.half(kv.buffer[s % 2], k),
                                   {ring.half(saved.out_TQ, q), ring.half(saved.lse_TN, q)}, pair);
    });
    next.wait();
    hop.wait();  // the sum of the ranks before, for the keys and values of this step
    if (s > 0) ops::add(ex, sum_TK[s % 2], sum_TK[s % 2], own_TK);
    hop = ring.pass_on(sum_TK[(s + 1) % 2], sum_TK[s % 2]);  // the last time home
  }
  hop.wait();
  const std::int64_t queries = shape.heads * shape.head_dim;
  ops::copy_columns(ex, dqkv_TH, 0, dq_TQ, 0, queries);
  ops::copy_columns(ex, dqkv_TH, queries, sum_TK[cp.size() % 2], 0, shape.kv_width());
}

}  // namespace upmoe
