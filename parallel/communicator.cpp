#include "parallel/communicator.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <sstream>

#include "kernels/core/philox.h"
#include "kernels/core/system_error.h"
#include "parallel/texts.h"

namespace upmoe {

Pending& Pending::operator=(Pending&& o) noexcept {
  if (this != &o) {
    if (wait_) wait_();
    wait_ = std::move(o.wait_);
    o.wait_ = nullptr;
  }
  return *this;
}

Pending::~Pending() {
  if (!wait_) return;
  try {
    wait_();
  } catch (const std::exception&) {  // dropped while another error unwinds: that one is reported
  }
}

void Pending::wait() {
  if (!wait_) return;
  const std::function<void()> wait = std::move(wait_);
  wait_ = nullptr;
  wait();
}

std::size_t row_bytes(const ConstTensorView& t) {
  Shape row = t.shape;
  if (row.rank > 0) row.dim[0] = 1;
  return static_cast<std::size_t>(row.elements()) * size_of(t.dtype);
}

std::size_t bytes_together(std::span<const ConstTensorView> tensors) {
  std::size_t bytes = 0;
  for (const ConstTensorView& t : tensors) bytes += t.bytes();
  return bytes;
}

namespace {

void check_stream(const char* verb, Device device, const On& on) {
  UPMOE_CHECK(device.type != DeviceType::kCuda || on.stream != nullptr, "{} between GPUs has a stream", verb);
}

void check_peer(const Communicator& comm, int peer) {
  UPMOE_CHECK(0 <= peer && peer < comm.size() && peer != comm.rank(),
              "rank {} of {} names rank {} as its peer", comm.rank(), comm.size(), peer);
}

void check_rows(const Communicator& comm, const TensorView& out, std::span<const std::int64_t> recv_rows,
                const ConstTensorView& in, std::span<const std::int64_t> send_rows) {
  const auto ranks = static_cast<std::size_t>(comm.size()), me = static_cast<std::size_t>(comm.rank());
  UPMOE_CHECK(recv_rows.size() == ranks && send_rows.size() == ranks,
              "row counts for {} and {} ranks, group of {}", recv_rows.size(), send_rows.size(), ranks);
  UPMOE_CHECK(in.dtype == out.dtype && row_bytes(in) == row_bytes(out), "rows of {} and of {}",
              in.shape.str(), out.shape.str());
  for (std::size_t p = 0; p < ranks; ++p)
    UPMOE_CHECK(recv_rows[p] >= 0 && send_rows[p] >= 0, "negative row count");
  UPMOE_CHECK(std::accumulate(send_rows.begin(), send_rows.end(), std::int64_t{0}) == in.rows() &&
                  std::accumulate(recv_rows.begin(), recv_rows.end(), std::int64_t{0}) == out.rows(),
              "row counts do not add up to {} and {}", in.shape.str(), out.shape.str());
  UPMOE_CHECK(send_rows[me] == recv_rows[me], "rank {} sends itself {} rows and expects {}", me,
              send_rows[me], recv_rows[me]);
}

template <class View>
void check_together(const char* verb, std::span<const View> tensors, const On& on) {
  UPMOE_CHECK(!tensors.empty(), "{} of no tensor", verb);
  for (const View& t : tensors) {
    check_stream(verb, t.device, on);
    UPMOE_CHECK(t.device == tensors.front().device, "{} of tensors of two devices together", verb);
  }
}

void book(const On& on, const char* verb, double bytes) {
  if (on.ledger != nullptr) on.ledger->book_sent(verb, bytes);
}

// Who counts the time that a rank stands still in a verb. Alone it waits for nobody, and what is on a GPU is waited for
// by its stream, of which the host's clock knows nothing.
Ledger* counts_waits(const On& on, Device device, int ranks) {
  return ranks > 1 && device.type == DeviceType::kCpu ? on.ledger : nullptr;
}

// From here to the end of the scope.
class Standstill {
 public:
  explicit Standstill(Ledger* ledger) : ledger_(ledger), start_(std::chrono::steady_clock::now()) {}
  ~Standstill() {
    if (ledger_ == nullptr) return;
    ledger_->book_wait(std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count());
  }
  Standstill(const Standstill&) = delete;

 private:
  Ledger* ledger_;
  std::chrono::steady_clock::time_point start_;
};

// A verb that goes on takes the rank's time where it begins and where it is waited for, not in between.
template <class Begin>
Pending timed(Ledger* ledger, const Begin& begin) {
  if (ledger == nullptr) return begin();
  const auto under_way = std::make_shared<Pending>();
  {
    const Standstill here(ledger);
    *under_way = begin();
  }
  return Pending([under_way, ledger] {
    const Standstill here(ledger);
    under_way->wait();
  });
}

// A verb that has finished when it returns is to the watcher what an op is.
void show(const On& on, const TensorView& written) {
  if (on.watcher != nullptr) on.watcher->writes(written);
}

// One that goes on is under way until it was waited for.
Pending shown(const On& on, const char* verb, const ConstTensorView& in, const TensorView& out,
              Pending transfer) {
  if (on.watcher == nullptr) return transfer;
  const auto under_way = std::make_shared<Pending>(std::move(transfer));
  return Pending([under_way, over = on.watcher->transfers(verb, in, out)] {
    under_way->wait();
    over();
  });
}

}  // namespace

Communicator::Communicator(int rank, int size) : rank_(rank), size_(size) {
  UPMOE_CHECK(0 <= rank && rank < size, "rank {} of {}", rank, size);
}

std::unique_ptr<Communicator> Communicator::subgroup(const std::vector<int>& members) {
  UPMOE_CHECK(!members.empty(), "an empty group");
  UPMOE_CHECK(std::find(members.begin(), members.end(), rank_) != members.end(),
              "rank {} is not in its own group", rank_);
  return do_subgroup(members);
}

std::unique_ptr<Communicator> Communicator::do_subgroup(const std::vector<int>& members) {
  return do_split(members.front(), rank_);  // disjoint groups have different first members
}

std::vector<Route> ring_routes(int ranks, bool backward, bool closed) {
  std::vector<Route> routes;
  const auto add = [&](int low, int high) {
    routes.push_back(backward ? Route{high, low} : Route{low, high});
  };
  for (const int parity : {0, 1})
    for (int r = parity; r + 1 < ranks; r += 2) add(r, r + 1);
  if (closed && ranks > 1) add(ranks - 1, 0);
  return routes;
}

void Communicator::connect(const std::vector<Route>& routes) {
  for (const Route& r : routes)
    UPMOE_CHECK(0 <= r.from && r.from < size_ && 0 <= r.to && r.to < size_ && r.from != r.to,
                "a route from rank {} to rank {} of {}", r.from, r.to, size_);
  do_connect(routes);
}

// Every rank sums a slice of its own: all others' parts of it arrive, its sum goes to all others.
void Communicator::all_reduce(TensorView inout, ReduceOp op, const On& on) {
  check_stream("all_reduce", inout.device, on);
  // What a rank sends: its part of every other slice, and its own slice's sum to all others. Booked by the formula, not
  // by the transport: small tensors go another way, and the books of two transports are to agree.
  book(on, "all_reduce", 2.0 * static_cast<double>(inout.bytes()) * (size_ - 1) / size_);
  show(on, inout);
  const Standstill here(counts_waits(on, inout.device, size_));
  do_all_reduce(inout, op, on.stream);
}

void Communicator::broadcast(TensorView inout, int root, const On& on) {
  UPMOE_CHECK(0 <= root && root < size_, "root {} of {}", root, size_);
  check_stream("broadcast", inout.device, on);
  if (root == rank_) book(on, "broadcast", static_cast<double>(inout.bytes()) * (size_ - 1));
  show(on, inout);
  const Standstill here(counts_waits(on, inout.device, size_));
  do_broadcast(inout, root, on.stream);
}

Pending Communicator::reduce_scatter(TensorView out, ConstTensorView in, const On& on) {
  UPMOE_CHECK(out.dtype == in.dtype && in.elements() == out.elements() * size_,
              "reduce_scatter of {} {} into {} {} on {} ranks", name_of(in.dtype), in.shape.str(),
              name_of(out.dtype), out.shape.str(), size_);
  check_stream("reduce_scatter", in.device, on);
  book(on, "reduce_scatter", static_cast<double>(out.bytes()) * (size_ - 1));
  return shown(on, "reduce_scatter", in, out, timed(counts_waits(on, in.device, size_), [&] {
                 return do_reduce_scatter(out, in, on.stream);
               }));
}

Pending Communicator::all_gather(TensorView out, ConstTensorView in, const On& on) {
  UPMOE_CHECK(out.dtype == in.dtype && out.elements() == in.elements() * size_,
              "all_gather of {} {} into {} {} on {} ranks", name_of(in.dtype), in.shape.str(),
              name_of(out.dtype), out.shape.str(), size_);
  check_stream("all_gather", in.device, on);
  book(on, "all_gather", static_cast<double>(in.bytes()) * (size_ - 1));
  return shown(on, "all_gather", in, out,
               timed(counts_waits(on, in.device, size_), [&] { return do_all_gather(out, in, on.stream); }));
}

Pending Communicator::all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows,
                                      ConstTensorView in, std::span<const std::int64_t> send_rows,
                                      const On& on) {
  check_rows(*this, out, recv_rows, in, send_rows);
  check_stream("all_to_all_rows", in.device, on);
  const std::int64_t leaving = in.rows() - send_rows[static_cast<std::size_t>(rank_)];
  book(on, "all_to_all_rows", static_cast<double>(leaving) * static_cast<double>(row_bytes(in)));
  return shown(on, "all_to_all_rows", in, out, timed(counts_waits(on, in.device, size_), [&] {
                 return do_all_to_all_rows(out, recv_rows, in, send_rows, on.stream);
               }));
}

Pending Communicator::send(std::span<const ConstTensorView> in, int to, const On& on) {
  check_peer(*this, to);
  check_together("send", in, on);
  book(on, "send", static_cast<double>(bytes_together(in)));
  Pending transfer =
      timed(counts_waits(on, in.front().device, size_), [&] { return do_send(in, to, on.stream); });
  for (const ConstTensorView& t : in) transfer = shown(on, "send", t, {}, std::move(transfer));
  return transfer;
}

void Communicator::recv(std::span<const TensorView> out, int from, const On& on) {
  check_peer(*this, from);
  check_together("recv", out, on);
  for (const TensorView& t : out) show(on, t);
  const Standstill here(counts_waits(on, out.front().device, size_));
  do_recv(out, from, on.stream);
}

void agree(Communicator& comm, ExitCode code, const std::string& local_error) {
  // One message for one fault: of the ranks that met an error the lowest one keeps its own.
  std::int32_t speaker = local_error.empty() ? comm.size() : comm.rank();
  comm.all_reduce(host_view(&speaker, {1}), ReduceOp::kMin);
  if (speaker == comm.size()) return;
  auto agreed = static_cast<std::int32_t>(code);
  comm.broadcast(host_view(&agreed, {1}), speaker);
  if (comm.rank() == speaker) throw Error(code, local_error);
  throw PeerError(static_cast<ExitCode>(agreed), "");
}

namespace {

// The first line that two texts do not share, as either has it, with the key that it stands under in a block of YAML.
std::string first_difference(const std::string& a, const std::string& b, int rank_of_b) {
  std::istringstream of_a(a), of_b(b);
  std::string line_a, line_b, above;
  while (true) {
    const bool more_a = static_cast<bool>(std::getline(of_a, line_a));
    const bool more_b = static_cast<bool>(std::getline(of_b, line_b));
    if (!more_a && !more_b) return "";
    if (!more_a) line_a.clear();
    if (!more_b) line_b.clear();
    if (line_a != line_b) break;
    if (!line_a.starts_with(' '))
      above = line_a.ends_with(':') ? line_a.substr(0, line_a.size() - 1) + "." : "";
  }
  constexpr std::size_t kShown = 200;
  const auto shown = [&](const std::string& line) {
    const std::size_t begin = line.find_first_not_of(' ');
    if (begin == std::string::npos) return std::string("nothing");
    const std::string key = begin > 0 ? above : "";
    return fmt::format("'{}{}'", key, line.substr(begin, kShown));
  };
  return fmt::format(" (rank 0 has {}, rank {} {})", shown(line_a), rank_of_b, shown(line_b));
}

}  // namespace

void require_equal(Communicator& comm, const std::string& what, const std::string& value) {
  // A hash in place of the text, which is a whole configuration and not equally long on all ranks.
  const auto mine = static_cast<std::int64_t>(philox_key(0, value));
  std::vector<std::int64_t> all(static_cast<std::size_t>(comm.size()));
  comm.all_gather(host_view(all.data(), {comm.size()}), host_view(&mine, {1})).wait();
  std::vector<int> others;
  for (int r = 0; r < comm.size(); ++r)
    if (all[static_cast<std::size_t>(r)] != all[0]) others.push_back(r);
  if (others.empty()) return;
  const int odd = others.front();
  const std::string its = broadcast_text(comm, comm.rank() == odd ? value : "", odd);
  constexpr std::size_t kNamed = 16;
  const bool more = others.size() > kNamed;
  if (more) others.resize(kNamed);
  const std::string message = fmt::format(
      "the ranks were started with different {}: rank 0 differs from rank {}{}{}; start all of them with "
      "the same program, files and arguments",
      what, fmt::join(others, ", "), more ? " and others" : "", first_difference(value, its, odd));
  agree(comm, ExitCode::kUsage, comm.rank() == 0 ? message : "");
}

void run_agreed(Communicator& comm, const std::function<void()>& body) {
  std::string message;
  ExitCode code = ExitCode::kFailure;
  const auto words = [](const char* what) { return *what == 0 ? "an error without a message" : what; };
  try {
    with_system_errors(body);
  } catch (const PeerError&) {
    throw;  // an inner agreement: every rank has it already
  } catch (const Error& e) {
    message = words(e.what());
    code = e.code();
  } catch (const std::exception& e) {
    message = words(e.what());
  }
  agree(comm, code, message);
}

}  // namespace upmoe
