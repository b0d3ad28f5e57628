#include "kernels/core/memory.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "kernels/core/gpu.h"

namespace upmoe {

namespace {

constexpr std::size_t kAlign = 256;

std::size_t round_up(std::size_t n) {
  return (n + kAlign - 1) / kAlign * kAlign;
}

constexpr std::size_t kUnlimited = ~std::size_t{0};

// The number behind `key` in a file of /proc, in kB there.
std::size_t kilobytes(const char* file, std::string_view key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);)
    if (line.starts_with(key)) return std::strtoull(line.c_str() + key.size(), nullptr, 10) << 10;
  return 0;
}

// Address space that this process may still take: `ulimit -v`, and where the kernel promises no more memory
// than there is (vm.overcommit_memory = 2) what it may still promise.
std::size_t address_space_left() {
  const auto minus = [](std::size_t all, std::size_t used) { return all - std::min(all, used); };
  std::size_t left = kUnlimited;
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    left = minus(limit.rlim_cur, kilobytes("/proc/self/status", "VmSize:"));
  int policy = 0;
  if (std::ifstream("/proc/sys/vm/overcommit_memory") >> policy && policy == 2)
    left = std::min(
        left, minus(kilobytes("/proc/meminfo", "CommitLimit:"), kilobytes("/proc/meminfo", "Committed_AS:")));
#ifdef __SANITIZE_THREAD__
  left = std::min(left, std::size_t{64} << 30);  // it keeps several bytes beside each
#endif
  return left;
}

const char* advice() {
  return address_space_left() == kUnlimited
             ? "lower train.micro_batch or use more ranks"
             : "the address space of this process is limited: start it with `ulimit -v unlimited` (and "
               "without vm.overcommit_memory = 2), or lower train.micro_batch or use more ranks";
}

// An arena of its full length where nothing limits address space, else an eighth of what is left: parameters
// and other arenas want some as well.
std::size_t reserve_of(std::size_t wish) {
  const std::size_t left = address_space_left();
  return left == kUnlimited ? wish : std::min(wish, round_up(left / 8));
}

// Anonymous pages are zero and are committed by the kernel on first touch. So an arena reserves far more addresses
// than it will use, like a GPU's (kernels/cuda/runtime/memory.cu): only what is touched costs.
std::byte* map_pages(std::size_t bytes, std::string_view what) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    fail(ExitCode::kFailure, "out of memory: {} asked for {} bytes of address space: {}; {}", what, bytes,
         std::strerror(errno), advice());
  madvise(p, bytes, MADV_HUGEPAGE);  // advice only: its failure changes nothing but speed
  return static_cast<std::byte*>(p);
}

}  // namespace

Buffer Buffer::allocate(Device device, std::size_t bytes, std::string_view what) {
  Buffer b;
  b.bytes_ = bytes;
  b.device_ = device;
  if (device.type == DeviceType::kDry || bytes == 0) return b;
  if (device.type == DeviceType::kCuda) {
    b.mem_ = {gpu::allocate(bytes, what), gpu::release};
  } else {
    b.mem_ = {map_pages(bytes, what), [bytes](std::byte* p) { munmap(p, bytes); }};
  }
  return b;
}

Buffer Buffer::allocate_on_host(Device device, std::size_t bytes, std::string_view what) {
  if (device.type != DeviceType::kCuda || bytes == 0) return allocate(device, bytes, what);
  Buffer b;
  b.bytes_ = bytes;
  b.device_ = device;
  b.mem_ = {gpu::allocate_on_host(bytes, what), gpu::release_on_host};
  return b;
}

TensorView Buffer::view(Shape shape, DType dtype) const {
  TensorView v{data(), shape, dtype, device_};
  UPMOE_CHECK(v.bytes() <= bytes_, "{} {} does not fit in {} bytes", name_of(dtype), shape.str(), bytes_);
  return v;
}

Arena::Arena(Device device, std::size_t reserve_bytes, std::string name)
    : device_(device), name_(std::move(name)), reserved_(round_up(std::max<std::size_t>(reserve_bytes, 1))) {
  if (device.type == DeviceType::kCpu) {
    reserved_ = reserve_of(reserved_);
    base_ = map_pages(reserved_, name_);
  }
  if (device.type == DeviceType::kCuda) {
    on_gpu_ = std::make_unique<gpu::Reservation>(reserved_, name_);
    base_ = on_gpu_->base();
  }
}

Arena::~Arena() {
  if (base_ != nullptr && on_gpu_ == nullptr) munmap(base_, reserved_);
}

std::string Arena::largest_users() const {
  std::vector<Use> largest = uses_;
  std::sort(largest.begin(), largest.end(), [](const Use& a, const Use& b) { return a.bytes > b.bytes; });
  std::string table;
  for (std::size_t i = 0; i < std::min<std::size_t>(5, largest.size()); ++i)
    table += fmt::format("\n  {:>14} bytes  {}", largest[i].bytes, largest[i].what);
  return table;
}

// A stack: what is taken last is given back first, by rewinding to a mark.
//
//   base_   | x_TD | qkv | ... |               free               |
//           0      mark        used_         peak_                reserved_
//
// On the dry device there is no memory, but used_ and peak_ are counted the same: so a rehearsal knows what a step
// needs.
TensorView Arena::take(Shape shape, DType dtype, std::string_view what) {
  TensorView v{nullptr, shape, dtype, device_};
  const std::size_t bytes = round_up(v.bytes());
  if (device_.type != DeviceType::kDry && bytes > reserved_ - used_) {
    fail(ExitCode::kFailure,
         "arena '{}' is full: {} {} for '{}' needs {} bytes, {} of {} are free; {}; largest users:{}", name_,
         name_of(dtype), shape.str(), what, bytes, reserved_ - used_, reserved_, advice(), largest_users());
  }
  if (on_gpu_ != nullptr && used_ + bytes > on_gpu_->committed()) commit(used_ + bytes, what);
  if (base_ != nullptr) v.data = base_ + used_;
  uses_.push_back({used_, bytes, std::string(what)});
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  return v;
}

void Arena::commit(std::size_t bytes, std::string_view what) {
  try {
    on_gpu_->commit(bytes);
  } catch (const Error& e) {
    fail(e.code(), "{}\nit was for '{}' in arena '{}', whose largest users are:{}", e.what(), what, name_,
         largest_users());
  }
}

void Arena::rewind(std::size_t mark) {
  UPMOE_CHECK(mark <= used_, "arena '{}': rewind to {} of {}", name_, mark, used_);
  while (!uses_.empty() && uses_.back().begin >= mark) uses_.pop_back();
  used_ = mark;
}

}  // namespace upmoe
