#pragma once
// The cases of sm90_instructions.cuh, for a machine that runs kernels: the model of the hardware,
// or a GPU. `Machine` gives Buffer<T> (size or values; data(), host()) and run(kernel, blocks,
// threads, shared bytes, cluster, arguments...).

#include <random>
#include <string>

#include "tests/kernels/sm90_instructions.cuh"

namespace upmoe::cuda::sm90 {

inline std::vector<bf16> random_elements(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<bf16> v(n);
  for (bf16& x : v) x = to_bf16(static_cast<float>(static_cast<int>(random() % 2001) - 1000) * 1e-3f);
  return v;
}

// Each returns what is wrong, empty when nothing is.
template <class Machine>
struct InstructionCases {
  template <class T>
  using Buffer = typename Machine::template Buffer<T>;

  // All maps of the experts' kernels at the sizes of Qwen1.5-MoE-A2.7B and 32,768 tokens. That of gates and ups has a
  // stride below the one before, which nothing forbids and the formula in cuda.h does not show.
  static std::string full_maps() {
    constexpr std::int64_t E = 60, D = 2048, F = 1408, R = 131072;
    const Buffer<bf16> memory(std::size_t{64});  // which nobody loads from
    for (const int blocks : {16, 8})
      make_tensor_map(memory.data(), {D, 8, 2, F / 8, E}, {4 * D, 2 * D, 32 * D, 4 * F * D},
                      {64, 8, 2, blocks, 1});
    for (const int rows : {256, 128})
      make_tensor_map(memory.data(), {F, D, E}, {2 * F, 2 * F * D}, {64, rows, 1});
    make_tensor_map(memory.data(), {D, 2 * F, E}, {2 * D, 4 * F * D}, {64, 64, 1});
    for (const std::int64_t inner : {F, 2 * F}) {
      make_tensor_map(memory.data(), {inner, R}, {2 * inner}, {64, 128});
      make_tensor_map(memory.data(), {inner, 1}, {2 * inner}, {64, 64});  // of one row: the box sticks out
    }
    return "";
  }
  // Of a block alone, and of a whole cluster of as many as need no leave.
  static std::string whole_memory() {
    for (const int blocks : {1, 8}) {
      const Buffer<u32> out(static_cast<std::size_t>(2 * blocks));
      Machine::run(whole_kernel, blocks, 32, sizeof(WholeShared), blocks, out.data());
      const auto got = out.host();
      for (std::size_t b = 0; b < got.size() / 2; ++b) {
        if (got[2 * b] != 0)
          return "it begins " + std::to_string(got[2 * b]) + " bytes behind a multiple of 1024";
        if (got[2 * b + 1] != 7 + b) return "the last byte of block " + std::to_string(b);
      }
    }
    return "";
  }

  template <Major kA, Major kB, int N>
  static std::string product() {
    const auto a = random_elements(64 * 64, 1), b = random_elements(64 * N, 2);
    const Buffer<bf16> da(a), db(b);
    const Buffer<float> out(std::size_t{64 * N});
    const TensorMap ma = make_tensor_map(da.data(), {64, 64}, {128}, {64, 64});
    const TensorMap mb = kB == Major::kK ? make_tensor_map(db.data(), {64, N}, {128}, {64, N})
                                         : make_tensor_map(db.data(), {N, 64}, {2 * N}, {64, 64});
    Machine::run(product_kernel<kA, kB, N>, 1, 128, sizeof(ProductShared<N>), 1, ma, mb, out.data());
    const double error = error_of_product<kA, kB, N>(a, b, out.host());
    return error < 1e-5 ? "" : "relative error " + std::to_string(error);
  }

  // A box that sticks out of the tensor on two sides is zero there.
  static std::string box_2d() {
    const auto x = random_elements(100 * 120, 3);
    const Buffer<bf16> dx(x);
    const Buffer<int> at(std::vector<int>{80, 40, 0, 0, 0});
    const Buffer<unsigned char> out(std::size_t{kImageBytes});
    const TensorMap map = make_tensor_map(dx.data(), {120, 100}, {240}, {64, 128});
    Machine::run(box_kernel<2>, 1, 128, sizeof(ImageShared), 1, map, at.data(), out.data());
    const auto image = out.host();
    for (std::size_t r = 0; r < 128; ++r)
      for (std::size_t c = 0; c < 64; ++c) {
        const bool inside = 40 + r < 100 && 80 + c < 120;
        if (image_at(image, r, c) != (inside ? x[(40 + r) * 120 + 80 + c].bits : 0))
          return "row " + std::to_string(r) + " column " + std::to_string(c);
      }
    return "";
  }
  static std::string box_3d() {
    const auto x = random_elements(3 * 100 * 128, 4);
    const Buffer<bf16> dx(x);
    const Buffer<int> at(std::vector<int>{64, 16, 2, 0, 0});
    const Buffer<unsigned char> out(std::size_t{kImageBytes});
    const TensorMap map = make_tensor_map(dx.data(), {128, 100, 3}, {256, 25600}, {64, 128, 1});
    Machine::run(box_kernel<3>, 1, 128, sizeof(ImageShared), 1, map, at.data(), out.data());
    const auto image = out.host();
    for (std::size_t r = 0; r < 128; ++r)
      for (std::size_t c = 0; c < 64; ++c)
        if (image_at(image, r, c) != (16 + r < 100 ? x[(2 * 100 + 16 + r) * 128 + 64 + c].bits : 0))
          return "row " + std::to_string(r) + " column " + std::to_string(c);
    return "";
  }
  // Row r of the box of gates and ups: neuron 8 * (r / 16) + r % 8, gate or up r / 8 % 2.
  static bool is_gate_up(const std::vector<unsigned char>& image, std::size_t from,
                         const std::vector<bf16>& w, std::size_t first_neuron, std::size_t k) {
    const std::vector<unsigned char> part(image.begin() + static_cast<std::ptrdiff_t>(from), image.end());
    for (std::size_t r = 0; r < 128; ++r)
      for (std::size_t c = 0; c < 64; ++c) {
        const std::size_t neuron = first_neuron + r / 16 * 8 + r % 8, row = 2 * neuron + r / 8 % 2;
        if (image_at(part, r, c) != w[row * 128 + k + c].bits) return false;
      }
    return true;
  }
  static TensorMap gate_up_map(const bf16* w, int blocks) {  // [2 experts, 64 neurons, 2, 128]
    return make_tensor_map(w, {128, 8, 2, 8, 2}, {512, 256, 4096, 32768}, {64, 8, 2, blocks, 1});
  }
  static std::string box_5d() {
    const auto w = random_elements(2 * 64 * 2 * 128, 5);
    const Buffer<bf16> dw(w);
    const Buffer<int> at(std::vector<int>{64, 0, 0, 0, 1});
    const Buffer<unsigned char> out(std::size_t{kImageBytes});
    Machine::run(box_kernel<5>, 1, 128, sizeof(ImageShared), 1, gate_up_map(dw.data(), 8), at.data(),
                 out.data());
    return is_gate_up(out.host(), 0, w, 64, 64) ? "" : "not the gates and ups in blocks of eight";
  }
  static std::string multicast_5d() {
    const auto w = random_elements(2 * 64 * 2 * 128, 6);
    const Buffer<bf16> dw(w);
    const Buffer<unsigned char> out(std::size_t{2 * kImageBytes});
    Machine::run(multicast_kernel<5>, 2, 128, sizeof(ImageShared), 2, gate_up_map(dw.data(), 4), out.data());
    const auto image = out.host();
    for (std::size_t rank = 0; rank < 2; ++rank)
      if (!is_gate_up(image, rank * kImageBytes, w, 64, 0)) return "block " + std::to_string(rank);
    return "";
  }
  static std::string multicast_3d() {
    const auto x = random_elements(2 * 128 * 64, 7);
    const Buffer<bf16> dx(x);
    const Buffer<unsigned char> out(std::size_t{2 * kImageBytes});
    const TensorMap map = make_tensor_map(dx.data(), {64, 128, 2}, {128, 16384}, {64, 64, 1});
    Machine::run(multicast_kernel<3>, 2, 128, sizeof(ImageShared), 2, map, out.data());
    const auto image = out.host();
    for (std::size_t r = 0; r < 256; ++r)
      for (std::size_t c = 0; c < 64; ++c)
        if (image_at(image, r, c) != x[(128 + r % 128) * 64 + c].bits)
          return "block " + std::to_string(r / 128) + " row " + std::to_string(r % 128);
    return "";
  }
  static std::string copies(void (*kernel)(const bf16*, unsigned char*)) {
    const auto x = random_elements(kImageBytes / 2, 8);
    const Buffer<bf16> dx(x);
    const Buffer<unsigned char> out(std::size_t{kImageBytes});
    Machine::run(kernel, 1, 128, sizeof(ImageShared), 1, static_cast<const bf16*>(dx.data()), out.data());
    const auto image = out.host();
    for (std::size_t i = 0; i < x.size(); ++i)
      if (image_at(image, i / 64, i % 64) != (i / 8 % 3 != 0 ? x[i].bits : 0))
        return "element " + std::to_string(i);
    return "";
  }
  static std::string exchange() {
    const Buffer<double> out(std::size_t{16});
    Machine::run(exchange_kernel, 4, 64, sizeof(ExchangeShared), 4, out.data());
    const auto got = out.host();
    for (std::size_t i = 0; i < got.size(); ++i)
      if (got[i] != 100.0 * static_cast<double>(i % 4) + static_cast<double>(i / 4))
        return "what block " + std::to_string(i / 4) + " has of block " + std::to_string(i % 4);
    return "";
  }
  static std::string matrices() {
    const Buffer<unsigned char> out(std::size_t{kImageBytes});
    const Buffer<u32> loaded(std::size_t{128});
    Machine::run(matrices_kernel, 1, 32, sizeof(ImageShared), 1, out.data(), loaded.data());
    const auto image = out.host();
    const auto pairs = loaded.host();
    const auto half = [&](std::size_t byte) { return static_cast<u32>(image[byte] | image[byte + 1] << 8); };
    for (u32 m = 0; m < 4; ++m)
      for (u32 row = 0; row < 8; ++row)
        for (u32 column = 0; column < 8; ++column) {
          const u32 value = 1000 * m + 8 * row + column;
          if (half(m * 128 + row * 16 + column * 2) != value) return "stmatrix, matrix " + std::to_string(m);
          const u32 lane = row * 4 + column / 2;
          if ((pairs[lane * 4 + m] >> 16 * (column % 2) & 0xffff) != value) return "ldmatrix";
        }
    return "";
  }
  static std::string registers() {
    std::vector<float> x;
    std::mt19937 random(9);
    for (int i = 0; i < 768; ++i) x.push_back(static_cast<float>(static_cast<int>(random())) * 1.000001f);
    const Buffer<float> dx(x);
    const Buffer<u32> out(std::size_t{384});
    Machine::run(registers_kernel, 1, 384, 0, 1, dx.data(), out.data());
    const auto got = out.host();
    for (std::size_t i = 0; i < got.size(); ++i)
      if (got[i] != (to_bf16(x[2 * i]).bits | static_cast<u32>(to_bf16(x[2 * i + 1]).bits) << 16))
        return "pair " + std::to_string(i);
    return "";
  }
  // body(name, case): the case returns what is wrong. First what no model can show, and all else stands on.
  template <class Body>
  static void each(const Body& body) {
    body("maps that the driver takes, full width", full_maps);
    body("shared memory of 227 KiB, in clusters of 8", whole_memory);
    body("registers that move, pairs of bf16", registers);
    body("copies of threads, zeros where not valid", [] { return copies(copies_kernel); });
    body("copies of threads that tell a barrier", [] { return copies(arriving_copies_kernel); });
    body("box of 2 dimensions, zeros outside", box_2d);
    body("box of 3 dimensions, zeros outside", box_3d);
    body("box of 5 dimensions", box_5d);
    body("multicast of 3 dimensions", multicast_3d);
    body("multicast of 5 dimensions", multicast_5d);
    body("product, a and b by rows of K, N 256", product<Major::kK, Major::kK, 256>);
    body("product, b by columns, N 256", product<Major::kK, Major::kMN, 256>);
    body("product, a and b by columns, N 256", product<Major::kMN, Major::kMN, 256>);
    body("product, a and b by rows of K, N 128", product<Major::kK, Major::kK, 128>);
    body("product, b by columns, N 128", product<Major::kK, Major::kMN, 128>);
    body("product, a and b by columns, N 128", product<Major::kMN, Major::kMN, 128>);
    body("stores to other blocks of a cluster", exchange);
    body("stmatrix, ldmatrix", matrices);
  }
};

}  // namespace upmoe::cuda::sm90
