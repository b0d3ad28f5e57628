#pragma once
// Where and in which order work happens. An Exec is passed to every op and layer; nothing is ambient.

#include "kernels/core/kernel_paths.h"
#include "kernels/core/ledger.h"
#include "kernels/core/memory.h"

namespace upmoe {

struct ExpertVariants;     // expert_variants.h
struct ProductAlgorithms;  // product_algorithms.h

// An ordered queue of work. On the CPU a call has finished when it returns, so the queue is empty; on a GPU
// ops return at once, and what the host wants to read it waits for.
class Stream {
 public:
  virtual ~Stream() = default;
  // Holds the host until everything given to the stream is done.
  virtual void synchronize() {}
  // Moves on transfers that take the host's help (MPI's progress happens inside its calls alone). Cheap:
  // called before every op on the CPU.
  virtual void poll() {}
};

// Sees what every op, and every verb between ranks, is about to touch: for tests of their order.
class OpWatcher {
 public:
  virtual ~OpWatcher() = default;
  virtual void reads(const ConstTensorView& t) = 0;
  virtual void writes(const TensorView& t) = 0;  // and may read
  // A transfer began that reads `in` and writes `out`, until what this returns is called.
  virtual std::function<void()> transfers(std::string_view, const ConstTensorView&, const TensorView&) {
    return [] {};
  }
};

struct Exec {
  Device device;
  Stream* stream = nullptr;  // may be null on the CPU
  Arena* scratch = nullptr;  // temporary memory of ops and layers, through ScratchScope
  Ledger* ledger = nullptr;  // may be null: nothing is booked
  Books books = Books::kModel;
  OpWatcher* watcher = nullptr;  // null outside tests
  // Two runs have the same bits. Without it a GPU's attention may sum its gradient in any order; all else
  // stays as it is.
  bool deterministic = true;
  // Products of rows with a layer's weight, on the CPU: row by row, each weight read once for all of them, as is
  // fastest for few. A row has the same bits beside any others. For generation; else as is fastest for many.
  bool row_by_row = false;
  ExpertsPath experts = ExpertsPath::kAuto;
  CrossEntropyPath cross_entropy = CrossEntropyPath::kAuto;
  const ProductAlgorithms* algorithms = nullptr;  // of dense products on a GPU; null: the library's first
  // Of fused experts' kernels on a GPU; null: the first of each.
  const ExpertVariants* expert_variants = nullptr;

  void book(std::string_view op, double flops, double bytes_read, double bytes_written,
            Work work = Work::kOther) const {
    if (ledger == nullptr) return;
    switch (books) {
      case Books::kModel:
        return ledger->book(op, flops, bytes_read, bytes_written, work);
      case Books::kAgain:
        return ledger->again(op, flops, bytes_read, bytes_written, work);
      case Books::kTeacher:
        return ledger->of_teacher(op, flops, bytes_read, bytes_written, work);
    }
  }
};

// To compute again in backward what forward did not keep, or what another rank computes as well: work done twice is not
// model work, so its ops are booked apart. What it sends is not: that goes over the wire a second time. Of a teacher's
// work it is all the teacher's.
inline Exec not_booked(const Exec& ex) {
  Exec again = ex;
  if (ex.books == Books::kModel) again.books = Books::kAgain;
  return again;
}

inline Exec for_teacher(const Exec& ex) {
  Exec taught = ex;
  taught.books = Books::kTeacher;
  return taught;
}

}  // namespace upmoe
