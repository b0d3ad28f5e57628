#include "tests/support/fake_cuda/sm90_emulation.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/core/bf16.h"
#include "tests/support/fake_cuda/sm90_machine.h"

namespace upmoe::cuda::sm90 {

using namespace sm90_twin;

namespace {

constexpr int kM = 64, kK = 16;  // of a product

// Under the 128-byte swizzle bits 4-6 of the address are exchanged with bits 7-9.
std::size_t swizzle(std::size_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

// An operand as the hardware finds it from its descriptor.
class Operand {
 public:
  Operand(u64 descriptor, Major major)
      : start_((descriptor & 0x3fff) << 4),
        leading_((descriptor >> 16 & 0x3fff) << 4),
        stride_((descriptor >> 32 & 0x3fff) << 4),
        major_(major) {
    if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
    if ((descriptor >> 49 & 7) != 0) fail("a descriptor with a base offset");
    if ((start_ >> 7 & 7) != 0) fail("a descriptor that begins behind the first of the swizzle's eight rows");
  }
  Major major() const { return major_; }
  // The place in shared memory of an element; `row` is of M or N.
  std::size_t at(int row, int k) const {
    const auto r = static_cast<std::size_t>(row), c = static_cast<std::size_t>(k);
    const std::size_t address = major_ == Major::kK
                                    ? start_ + r / 8 * stride_ + r % 8 * 128 + c * 2
                                    : start_ + r / 64 * leading_ + c / 8 * stride_ + c % 8 * 128 + r % 64 * 2;
    return swizzle(address) - kLowestAddress;
  }

 private:
  std::size_t start_, leading_, stride_;
  Major major_;
};
static_assert(kGrain == 8 * sizeof(bf16) && kM % 8 == 0 && kK % 8 == 0);

bf16 element(const Block& block, std::size_t at) {
  bf16 value;
  std::memcpy(&value, block.base + at, sizeof value);
  return value;
}

}  // namespace

u32 shared_address(const void* p) {
  return static_cast<u32>(cluster().block().place(p, 0, "an address") + kLowestAddress);
}

namespace {

// Where element `e` of the box comes from; null outside of the tensor.
const unsigned char* source(const TensorMap& map, const std::vector<int>& start, std::size_t e) {
  std::int64_t from = 0;
  for (int i = 0; i < map.rank; ++i) {
    const auto box = static_cast<std::size_t>(map.box[i]);
    const std::int64_t x =
        start[static_cast<std::size_t>(i)] + static_cast<std::int64_t>(e % box) * map.step[i];
    e /= box;
    if (x < 0 || x >= map.size[i]) return nullptr;
    from += x * map.stride[i];
  }
  return map.base + from;
}
// Elements [begin, end) of the box, in its order, zeros outside of the tensor: by grains where a grain's elements, of
// which no swizzle changes the order, lie in a row of both, which all but a tensor's edges do.
void copy_box(Block& block, std::size_t at, const TensorMap& map, const std::vector<int>& start,
              std::size_t begin, std::size_t end) {
  constexpr std::size_t kRun = kGrain / sizeof(bf16);
  const bool in_rows = map.step[0] == 1 && map.stride[0] == sizeof(bf16) && map.box[0] % kRun == 0 &&
                       begin % kRun == 0 && end % kRun == 0 && at % kGrain == 0;
  for (std::size_t e = begin; e < end;) {
    const unsigned char* from = source(map, start, e);
    unsigned char* to = block.base + swizzle(at + kLowestAddress + e * sizeof(bf16)) - kLowestAddress;
    const bool run = in_rows && from != nullptr && source(map, start, e + kRun - 1) != nullptr;
    const std::size_t bytes = run ? kGrain : sizeof(bf16);
    if (from != nullptr)
      std::memcpy(to, from, bytes);
    else
      std::memset(to, 0, bytes);
    e += bytes / sizeof(bf16);
  }
}
// What the box asks of global memory, and of `blocks` blocks' shared memory.
void count_box(std::size_t at, const TensorMap& map, const std::vector<int>& start, std::size_t elements,
               int blocks) {
  std::vector<Access> reads, writes;
  for (std::size_t e = 0; e < elements; e += kGrain / sizeof(bf16)) {
    writes.push_back({swizzle(at + kLowestAddress + e * 2), kGrain});
    if (const unsigned char* from = source(map, start, e); from != nullptr)
      reads.push_back({reinterpret_cast<std::uintptr_t>(from), kGrain});
  }
  const char* who = "tensor load";
  counted->add({Space::kGlobal, who}, global_demand(reads));
  for (int i = 0; i < blocks; ++i) counted->add({Space::kShared, who}, shared_demand(writes));
}

}  // namespace

void load_box(std::uint16_t blocks, void* to, const TensorMap& map, u64* bar, std::initializer_list<int> at) {
  std::size_t elements = 1;
  for (int i = 0; i < map.rank; ++i) elements *= static_cast<std::size_t>(map.box[i]);
  const char* who = "a tensor load";
  const std::size_t place = cluster().block().place(to, 2 * elements, who);
  const std::size_t bar_place = cluster().block().place(bar, 8, who);
  if (place % 128 != 0) fail(std::string(who) + ": the place in shared memory is no multiple of 128");
  if (at.size() != static_cast<std::size_t>(map.rank))
    fail(std::string(who) + ": other coordinates than the map has dimensions");
  if (reinterpret_cast<std::uintptr_t>(&map) % 64 != 0)
    fail(std::string(who) + ": the map's address is no multiple of 64");
  if (blocks == 0 || blocks >> cluster().blocks.size() != 0)
    fail(std::string(who) + " to a block that the cluster does not have");
  const std::vector<int> start(at);
  if (counted != nullptr) count_box(place, map, start, elements, std::popcount(blocks));
  for (const auto& there : cluster().blocks) {
    if ((blocks >> there->rank & 1) == 0) continue;
    Block* block = there.get();
    Barrier* barrier = &block->shown_barrier(bar_place, who);
    block->begin_write(place, 2 * elements, who);
    for (std::size_t half = 0; half < 2; ++half)  // at moments of their own
      cluster().begin(make_operation(who, [=] {
        copy_box(*block, place, map, start, half * elements / 2, (half + 1) * elements / 2);
        block->end_write(place + half * elements, elements, -1);
        barrier->expect(-static_cast<std::int64_t>(elements), who);
        barrier->settle();
      }));
  }
}
void load_box_here(void* to, const TensorMap& map, u64* bar, std::initializer_list<int> at) {
  load_box(static_cast<std::uint16_t>(1u << cluster().block().rank), to, map, bar, at);
}

void cp_async_16(void* to, const void* from, bool valid, const Site& site) {
  if (counted != nullptr) {
    count_access({Space::kShared, "cp.async", site}, to, 16);
    count_access({Space::kGlobal, "cp.async", site}, from, 16, valid);
  }
  Lane* lane = &cluster().lane();
  Block* block = lane->block;
  const std::size_t at = block->place(to, 16, "cp.async");
  if (at % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    fail("cp.async: an address is no multiple of 16");
  block->begin_write(at, 16, "cp.async");
  const OperationPtr copy = make_operation("cp.async", [=] {
    if (valid)
      std::memcpy(block->base + at, from, 16);
    else
      std::memset(block->base + at, 0, 16);
    block->end_write(at, 16, static_cast<int>(lane->index));
    lane->written.push_back(at / kGrain);
  });
  copy->quiet = true;
  cluster().begin(copy);
  lane->copies.operations.push_back(copy);
  lane->recent_copies.push_back(copy);
}
void cp_async_arrive(u64* bar) {
  Lane& lane = cluster().lane();
  Block* block = lane.block;
  const std::size_t at = block->place(bar, 8, "cp.async.mbarrier.arrive");
  block->barrier(at, "cp.async.mbarrier.arrive");
  const OperationPtr arrival = make_operation("an arrival of copies", [block, at] {
    block->barrier(at, "cp.async.mbarrier.arrive").arrive("cp.async.mbarrier.arrive");
  });
  const auto done = [](const OperationPtr& copy) { return copy->done; };
  std::erase_if(lane.recent_copies, done);
  if (lane.copies.ends.empty()) std::erase_if(lane.copies.operations, done);  // of no group yet
  arrival->after = lane.recent_copies;
  cluster().begin(arrival);
}
void cp_async_commit() {
  cluster().lane().copies.commit();
}
void wait_copies(std::size_t groups) {
  wait_groups(cluster().lane().copies, groups, "wait for copies (cp.async.wait_group)");
}
void fence_proxy_async() {
  Lane& lane = cluster().lane();
  for (std::size_t grain : lane.written) lane.block->show_to_engines(grain, static_cast<int>(lane.index));
  lane.written.clear();
  lane.fenced_at = now();
}

namespace {

template <class Move>  // (register, half of it, where)
void move_matrices(const char* what, const void* row, const Site& site, const Move& move) {
  Lane& lane = cluster().lane();
  if (lane.block->place(row, 16, "a matrix") % 16 != 0)
    fail("a matrix: a row's address is no multiple of 16");
  Warp& warp = lane.block->warps[lane.index / 32];
  warp.rows[lane.index % 32] = static_cast<unsigned char*>(const_cast<void*>(row));
  cluster().warp_barrier(0xffffffffu);
  if (counted != nullptr && lane.index % 32 == 0)
    for (std::size_t m = 0; m < 4; ++m) {
      const auto at = [&](std::size_t i) { return lane.block->place(warp.rows[8 * m + i], 16, what); };
      count_matrix({Space::kShared, what, site}, at);
    }
  for (u32 m = 0; m < 4; ++m)
    for (u32 i = 0; i < 2; ++i)
      move(m, i, warp.rows[8 * m + lane.index % 32 / 4] + 2 * (lane.index % 4 * 2 + i));
  cluster().warp_barrier(0xffffffffu);
}

}  // namespace

void stmatrix_x4(void* row, u32 a, u32 b, u32 c, u32 d, const Site& site) {
  const u32 r[4] = {a, b, c, d};
  move_matrices("stmatrix", row, site, [&](u32 m, u32 i, unsigned char* at) {
    const auto value = static_cast<std::uint16_t>(r[m] >> 16 * i);
    std::memcpy(at, &value, sizeof value);
  });
}
void ldmatrix_x4(const void* row, u32& a, u32& b, u32& c, u32& d, const Site& site) {
  u32 r[4] = {};
  move_matrices("ldmatrix", row, site, [&](u32 m, u32 i, const unsigned char* at) {
    std::uint16_t value;
    std::memcpy(&value, at, sizeof value);
    r[m] |= static_cast<u32>(value) << 16 * i;
  });
  a = r[0], b = r[1], c = r[2], d = r[3];
}
u32 pack_bf16(float low, float high) {
  return to_bf16(low).bits | static_cast<u32>(to_bf16(high).bits) << 16;
}

namespace {

// Calls f(row, k, place) for the first of every eight elements that lie together: of a row, or of one k.
template <class F>
void for_each_grain(const Operand& operand, int rows, const F& f) {
  const bool along_k = operand.major() == Major::kK;
  for (int row = 0; row < rows; row += along_k ? 1 : 8)
    for (int k = 0; k < kK; k += along_k ? 8 : 1) f(row, k, operand.at(row, k));
}
// In fp32, element (row, k) at [k * rows + row].
void load(const Block& block, const Operand& operand, int rows, float* by_k) {
  const int row_step = operand.major() == Major::kK ? 0 : 1, k_step = 1 - row_step;
  for_each_grain(operand, rows, [&](int row, int k, std::size_t place) {
    for (int i = 0; i < 8; ++i)
      by_k[(k + i * k_step) * rows + row + i * row_step] =
          to_float(element(block, place + 2 * static_cast<std::size_t>(i)));
  });
}

// Reads the operands now, which is as late as the model lets it.
void compute(const Product& product, const Block& block) {
  static thread_local float a[kK * kM], b[kK * 256];
  const int n = product.n;
  load(block, Operand(product.a, product.major_a), kM, a);
  load(block, Operand(product.b, product.major_b), n, b);
  for (int row = 0; row < kM; ++row) {
    float sums[256] = {};
    for (int k = 0; k < kK; ++k)  // all columns' sums side by side
      for (int c = 0; c < n; ++c) sums[c] += a[k * kM + row] * b[k * n + c];
    const int half = row % 16 / 8;
    float* const* threads = product.d + row / 16 * 32 + row % 8 * 4;
    for (int c = 0; c < n; ++c) {
      float& sum = threads[c % 8 / 2][c / 8 * 4 + half * 2 + c % 2];
      sum = (product.add ? sum : 0.0f) + sums[c];
    }
  }
}
std::vector<std::size_t> grains_of(const Product& product) {
  std::vector<std::size_t> grains;
  const auto add = [&](int, int, std::size_t place) { grains.push_back(place / kGrain); };
  for_each_grain(Operand(product.a, product.major_a), kM, add);
  for_each_grain(Operand(product.b, product.major_b), product.n, add);
  return grains;
}
void count_operand(const char* what, const Operand& operand, int rows) {
  const int row_step = operand.major() == Major::kK ? 1 : 0;
  for (int row = 0; row < rows; row += 8)
    for (int k = 0; k < kK; k += 8)
      count_matrix({Space::kShared, what},
                   [&](int i) { return operand.at(row + i * row_step, k + i * (1 - row_step)); });
}

// Of the sums in these registers, which are not to be looked at before a wait.
Accumulator& accumulator(Lane& lane, float* d, int n) {
  Accumulator* found = nullptr;
  for (Accumulator& a : lane.accumulators) {
    if (a.registers == d) return a;
    if (a.registers == nullptr) found = &a;
  }
  if (found == nullptr) found = &lane.accumulators.emplace_back();
  found->registers = d;
  found->sums.assign(d, d + n);
  std::fill(d, d + n, std::nanf(""));
  return *found;
}

}  // namespace

void wgmma_fence() {
  cluster().lane().fenced = true;
}
void multiply(float* d, int n, u64 a, u64 b, bool add, Major major_a, Major major_b) {
  Lane& lane = cluster().lane();
  Block* block = lane.block;
  if (!lane.fenced) fail("wgmma without wgmma.fence behind the last use of its registers");
  Warpgroup& group = block->groups[lane.index / kGroup];
  if (lane.joined_products == group.products.size()) {
    auto made = std::make_shared<Product>(Product{a, b, n, add, major_a, major_b, 0, {}, nullptr, {}, ~0ull});
    made->operation = make_operation("a product", [p = made.get(), block] {
      compute(*p, *block);
      block->end_read(p->grains);
      p->grains = {};
    });
    group.products.push_back(std::move(made));
  }
  Product& product = *group.products[lane.joined_products++];
  if (product.a != a || product.b != b || product.n != n || product.add != add)
    fail("wgmma: the threads of a warpgroup differ in an operand");
  product.d[lane.index % kGroup] = accumulator(lane, d, n / 2).sums.data();
  product.fenced_at = std::min(product.fenced_at, lane.fenced_at);
  lane.products.operations.push_back(product.operation);
  if (++product.joined < kGroup) return;
  if (counted != nullptr) {
    count_operand("wgmma, a", Operand(a, major_a), kM);
    count_operand("wgmma, b", Operand(b, major_b), n);
  }
  product.grains = grains_of(product);
  block->begin_read(product.grains, product.fenced_at);
  // A warpgroup's products happen in order.
  if (group.last != nullptr) product.operation->after = {group.last};
  group.last = product.operation;
  cluster().begin(product.operation);
}
void wgmma_commit() {
  cluster().lane().products.commit();
}
void wait_products(std::size_t groups) {
  Lane& lane = cluster().lane();
  wait_groups(lane.products, groups, "wait for products (wgmma.wait_group)");
  if (lane.products.are_none()) {  // the registers hold results again
    for (Accumulator& a : lane.accumulators) {
      if (a.registers != nullptr) std::memcpy(a.registers, a.sums.data(), a.sums.size() * sizeof(float));
      a.registers = nullptr;
    }
  }
  lane.fenced = false;
}

void move_registers(int to, bool up) {
  Lane& lane = cluster().lane();
  Block* block = lane.block;
  if (to % 8 != 0 || to < 24 || to > 256) fail("setmaxnreg: " + std::to_string(to));
  const int more = to - lane.registers;
  if (up != (more >= 0)) fail("setmaxnreg: the wrong direction");
  if (more > 0)
    cluster().wait_until([block, more] { return block->free_registers >= more; },
                         [] { return std::string("wait for registers (setmaxnreg.inc)"); });
  block->free_registers -= more;
  lane.registers = to;
}

}  // namespace upmoe::cuda::sm90
