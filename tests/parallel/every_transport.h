#pragma once
// Tests of communicators run on every transport: one rank alone, threads, under mpirun MPI with whole and
// with chopped messages, and NCCL between GPUs; some of them behind the comparison of the ranks' verbs.

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <numeric>

#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"
#include "parallel/checked_comm.h"
#include "parallel/communicator.h"
#include "parallel/mpi_comm.h"
#include "parallel/runtime.h"
#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"
#include "tests/parallel/on_gpu.h"
#include "tests/support/test_device.h"

namespace upmoe {

inline Communicator* mpi_world = nullptr;    // null outside mpirun
inline Communicator* mpi_chopped = nullptr;  // messages of at most 1000 bytes
inline Communicator* mpi_checked = nullptr;

using Body = std::function<void(Communicator&)>;

class EveryTransport : public testing::TestWithParam<std::string> {
 protected:
  static void on_all_ranks(const Body& body) {
    const std::string& transport = GetParam();
    if (transport == "self") {
      body(*make_self_communicator());
    } else if (transport == "mpi") {
      body(*mpi_world);
    } else if (transport == "mpi_chopped") {
      body(*mpi_chopped);
    } else if (transport == "mpi_checked") {
      body(*mpi_checked);
    } else if (test::on_gpu()) {
      run_in_threads(transport.back() - '0', [&](Communicator& world) {
        gpu::use(world.rank());
        auto on_gpu = std::make_unique<OnGpu>(make_nccl_communicator(world.split(0, world.rank())));
        body(is_checked() ? *make_checked_communicator(std::move(on_gpu)) : *on_gpu);
      });
    } else if (is_checked()) {
      run_in_threads(transport.back() - '0', [&](Communicator& world) {
        body(*make_checked_communicator(world.split(0, world.rank())));
      });
    } else {
      ASSERT_TRUE(transport.starts_with("threads")) << "how is " << transport << " started?";
      run_in_threads(transport.back() - '0', body);
    }
  }
  static bool is_checked() { return GetParam().find("checked") != std::string::npos; }
};

inline std::vector<std::string> transports() {
  if (mpi_world != nullptr) return {"mpi", "mpi_chopped", "mpi_checked"};
  if (test::on_gpu()) {
    std::vector<std::string> all;
    for (const char* transport : {"nccl1", "nccl2", "nccl3", "nccl4", "checked_nccl3"})
      if (transport[std::strlen(transport) - 1] - '0' <= gpu::count()) all.emplace_back(transport);
    return all;
  }
  return {"self", "threads1", "threads2", "threads3", "threads4", "checked3"};
}

template <class T>
struct WideOf {
  using type = T;
};
template <>
struct WideOf<float> {
  using type = double;
};
template <>
struct WideOf<bf16> {
  using type = float;
};

// What rank r holds at position i. Not inlined: its product must be rounded before it is added.
template <class T>
[[gnu::noinline]] T random_value(int r, std::int64_t i) {
  std::uint64_t bits = static_cast<std::uint64_t>(r * 1'000'003 + i) * 0x9E3779B97F4A7C15ull;  // splitmix64
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  bits ^= bits >> 27;
  const float sign = (bits & 1u) != 0 ? 1.0f : -1.0f, scale = static_cast<float>(1u << (bits >> 1 & 7u));
  const float v = sign * scale * uniform_from_bits(static_cast<std::uint32_t>(bits >> 32));
  if constexpr (std::is_same_v<T, bf16>) {
    return to_bf16(v);
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(v * 1000);
  } else {
    return static_cast<T>(v) * static_cast<T>(1.1);  // fills the low bits of fp64 as well
  }
}

template <class T>
std::vector<T> random_vector(int r, std::int64_t n) {
  std::vector<T> v;
  for (std::int64_t i = 0; i < n; ++i) v.push_back(random_value<T>(r, i));
  return v;
}

template <class T>
T ordered_result(ReduceOp op, int ranks, std::int64_t i) {
  using Wide = typename WideOf<T>::type;
  const auto at = [&](int r) {
    if constexpr (std::is_same_v<T, bf16>) {
      return to_float(random_value<T>(r, i));
    } else {
      return random_value<T>(r, i);
    }
  };
  Wide result = at(0);
  for (int r = 1; r < ranks; ++r) {
    if (op == ReduceOp::kSum) result = static_cast<Wide>(result + at(r));
    if (op == ReduceOp::kMax) result = std::max<Wide>(result, at(r));
    if (op == ReduceOp::kMin) result = std::min<Wide>(result, at(r));
  }
  if constexpr (std::is_same_v<T, bf16>) {
    return to_bf16(result);
  } else {
    return static_cast<T>(result);
  }
}

template <class T>
TensorView view(std::vector<T>& v) {
  return host_view(v.data(), {static_cast<std::int64_t>(v.size())});
}
template <class T>
ConstTensorView view(const std::vector<T>& v) {
  return host_view(v.data(), {static_cast<std::int64_t>(v.size())});
}

template <class T>
bool bitwise_equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// How many rows `from` sends to `to` in round `round`; many are zero.
inline std::int64_t row_count(int round, int from, int to) {
  const std::uint32_t bits =
      philox(static_cast<std::uint64_t>(round), static_cast<std::uint64_t>(from * 64 + to))[0];
  return bits % 3 == 0 ? 0 : bits % 17;
}

struct Exchange {  // one all_to_all_rows with its buffers
  std::vector<std::int64_t> send_rows, recv_rows;
  std::vector<float> in, out, expected;
  Pending start(Communicator& comm, int round) {
    constexpr std::int64_t kWidth = 5;
    const auto value = [&](int from, int to, std::int64_t k) {
      return static_cast<float>(((round * 8 + from) * 8 + to) * 1000) + static_cast<float>(k);
    };
    for (int p = 0; p < comm.size(); ++p) {
      send_rows.push_back(row_count(round, comm.rank(), p));
      recv_rows.push_back(row_count(round, p, comm.rank()));
      for (std::int64_t k = 0; k < send_rows.back() * kWidth; ++k) in.push_back(value(comm.rank(), p, k));
      for (std::int64_t k = 0; k < recv_rows.back() * kWidth; ++k)
        expected.push_back(value(p, comm.rank(), k));
    }
    out.assign(expected.size(), -1.0f);
    const auto rows = [](const std::vector<float>& v) {
      return static_cast<std::int64_t>(v.size()) / kWidth;
    };
    return comm.all_to_all_rows(host_view(out.data(), {rows(out), kWidth}), recv_rows,
                                host_view(static_cast<const float*>(in.data()), {rows(in), kWidth}),
                                send_rows);
  }
};

}  // namespace upmoe
