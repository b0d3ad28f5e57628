// What stands for CUDA in a build without it: there is no GPU, and what asks for one fails and says so.

#include "kernels/core/gpu.h"
#include "kernels/ops/backend.h"

namespace upmoe {

namespace gpu {

namespace {

[[noreturn]] void refuse() {
  fail(ExitCode::kDevice, "device: cuda was asked for, but {}; use device: cpu", why_none());
}

}  // namespace

bool is_built() {
  return false;
}
int count() {
  return 0;
}
std::string why_none() {
  return "this program was built without CUDA";
}
std::string device_name(int) {
  refuse();
}
std::string name_of(int) {
  refuse();
}
std::size_t memory_of(int) {
  refuse();
}
std::string driver_version() {
  return {};
}
std::vector<std::pair<std::string, std::string>> libraries() {
  return {};
}
std::string pci_id(int) {
  refuse();
}
void use(int) {
  refuse();
}
int current() {
  refuse();
}
ProductLibrary product_library() {
  refuse();
}
void copy(Stream&, std::byte*, const std::byte*, std::size_t) {
  refuse();
}
void* raw(Stream&) {
  refuse();
}
Event::Event(bool) {
  refuse();
}
Event::~Event() = default;
void Event::record(Stream&) {
  refuse();
}
void Event::hold(Stream&) const {
  refuse();
}
void Event::wait() const {
  refuse();
}
bool Event::has_passed() const {
  refuse();
}
double Event::seconds_since(const Event&) const {
  refuse();
}
void fold_slices(Stream&, ReduceOp, DType, std::byte*, const std::byte*, const std::byte*, int, int,
                 std::int64_t) {
  refuse();
}
std::unique_ptr<Stream> make_stream() {
  refuse();
}
std::byte* allocate(std::size_t, std::string_view) {
  refuse();
}
void release(std::byte*) noexcept {}
std::byte* allocate_on_host(std::size_t, std::string_view) {
  refuse();
}
void release_on_host(std::byte*) noexcept {}
Reservation::Reservation(std::size_t, std::string_view) {
  refuse();
}
Reservation::~Reservation() = default;
void Reservation::commit(std::size_t) {
  refuse();
}

}  // namespace gpu

const Backend& cuda::backend() {
  gpu::refuse();
}

}  // namespace upmoe
