#pragma once
// What a step costs, counted where the work is asked for: every checked op entry and every communicator verb
// books here. Model FLOPs (MFU), the memory traffic of a roofline, the bytes on each link and the time that a rank
// stands still for others all come from this one count.

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>

namespace upmoe {

// What an op's FLOPs are: the model's, which MFU counts, by what bounds their speed; or what stands around them.
enum class Work : std::uint8_t {
  kOther,
  kProduct,          // one dense product
  kGroupedProducts,  // one for each expert, or for each group of tokens
  kAttention,
  kAttentionBackward,
  kRowSums  // of the model as well, as fast as memory
};
constexpr bool is_of_model(Work work) {
  return work != Work::kOther;
}
constexpr bool is_attention(Work work) {
  return work == Work::kAttention || work == Work::kAttentionBackward;
}

struct Cost {
  std::int64_t calls = 0;
  double flops = 0;       // multiply and add count as two
  double bytes_read = 0;  // compulsory traffic: each operand once
  double bytes_written = 0;
  double bytes_sent = 0;       // leaving this rank
  double model_flops = 0;      // those of flops that are the model's
  double attention_flops = 0;  // those of model_flops that are attention's
  double model_again = 0;      // the model's that are computed a second time; in none of the others
  double teacher_flops = 0;    // of a teacher; likewise
  Cost& operator+=(const Cost& o) { return add(o, 1); }
  Cost& add(const Cost& o, double times);
};

// As whose work an op is booked: the model's, that which is done once more, or that of the teacher which a model learns
// from. What is sent between ranks is booked alike for all.
enum class Books : std::uint8_t { kModel, kAgain, kTeacher };

// What a listener is told of an op. What is not booked as the model's is in no entry but as model_again or
// teacher_flops.
struct ToldOp {
  std::string_view name;
  Work work;
  Cost cost;
  Books books = Books::kModel;
};

// One ledger per rank; not thread-safe.
class Ledger {
 public:
  void book(std::string_view op, double flops, double bytes_read, double bytes_written,
            Work work = Work::kOther);
  // An op that computes once more what is booked elsewhere: its work for the model is kept apart.
  void again(std::string_view op, double flops, double bytes_read, double bytes_written, Work work);
  // An op of a model that the one being trained learns from: likewise.
  void of_teacher(std::string_view op, double flops, double bytes_read, double bytes_written, Work work);
  void book_sent(std::string_view verb, double bytes);
  // Time in which the rank did nothing but a transfer. In no entry, so that books of two runs can be compared.
  void book_wait(double seconds) { seconds_waited_ += seconds; }
  double seconds_waited() const { return seconds_waited_; }
  const std::map<std::string, Cost, std::less<>>& entries() const { return entries_; }
  Cost total() const;
  void clear() {
    entries_.clear();
    seconds_waited_ = 0;
  }
  // Told of each op that is booked, done again or a teacher's, from now on, before it is given to the device: for
  // timing ops where they run, or where they would.
  using Listener = std::function<void(const ToldOp&)>;
  void listen(Listener listener) { listener_ = std::move(listener); }

 private:
  std::map<std::string, Cost, std::less<>> entries_;
  double seconds_waited_ = 0;
  Listener listener_;
};

}  // namespace upmoe
