#pragma once
// What a run will cost, before it starts: the real Trainer on the dry device, as one rank of a world that does not
// exist, over micro-batches that nobody reads. No file is opened and nothing is computed; everything is booked.

#include <memory>

#include "parallel/dry_comm.h"
#include "trainer/trainer.h"

namespace upmoe {

class DryBatches;

// Routers are taken to be balanced: every expert gets the same rows from every rank. Where that is so, a step books
// what the same rank of a real run books, entry by entry; and a rank holds as much, but for the scratch memory that a
// backend takes inside an op. (A rank without a micro-batch in a round sends no rows and is taken to get none.)
class Rehearsal {
 public:
  // Of `run`, neither its data and model files nor its directory are looked at. Experts are computed as kernels.experts
  // asks for on a GPU that can, unless `device` is cpu. `wire`, where given, is shown every transfer, and outlives the
  // rehearsal.
  Rehearsal(const RunConfig& run, const ModelConfig& model, int rank, int ranks, DryWire* wire = nullptr);

  // Step 1, 2, ...: what it books. In the first one no updated weights are under way yet; the others are alike.
  // `rounds`: of so many micro-batches of this rank, in place of those that the run gives it; 0: of those.
  const Ledger& step(std::int64_t rounds = 0);
  // Called with every op of the steps that follow, before it would begin.
  void listen(Ledger::Listener listener) { session_.memory.ledger.listen(std::move(listener)); }
  MemoryUse memory_use() const { return session_.memory_use(); }  // of the steps so far
  const Session& session() const { return session_; }

 private:
  std::unique_ptr<Communicator> world_;
  Session session_;
  DryBatches* batches_ = nullptr;  // the session's
  Trainer trainer_;
  std::int64_t steps_ = 0;
};

// What one rank books for the forward alone of one sequence, or of as many as routers route together, in bf16, as
// `upmoe eval` computes it.
Ledger rehearse_forward(const ModelConfig& model, std::int64_t seq_len);
// And for one prompt of so many tokens that generation continues, up to the logits of its last one: keys and values of
// all tokens, of the last block and the head what that token needs.
Ledger rehearse_prompt(const ModelConfig& model, std::int64_t tokens);

}  // namespace upmoe
