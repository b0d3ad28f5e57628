#include "trainer/event_file.h"

#include <unistd.h>

#include <bit>
#include <chrono>
#include <cstring>

#include "data/crc.h"
#include "kernels/core/log.h"
#include "parallel/host.h"

namespace upmoe {

namespace {

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Protobuf wire format: a key is (field number << 3) | wire type; 0 varint, 1 eight bytes, 2
// length-delimited, 5 four.
void put_varint(std::string& s, std::uint64_t v) {
  for (; v >= 0x80; v >>= 7) s += static_cast<char>((v & 0x7f) | 0x80);
  s += static_cast<char>(v);
}
template <class T>
void put_fixed(std::string& s, T v) {
  char bytes[sizeof v];
  std::memcpy(bytes, &v, sizeof v);
  s.append(bytes, sizeof v);
}
void put_string(std::string& s, int field, const std::string& v) {
  put_varint(s, static_cast<std::uint64_t>(field) << 3 | 2u);
  put_varint(s, v.size());
  s += v;
}
std::string event_head(std::int64_t step) {
  std::string e;
  e += static_cast<char>(1 << 3 | 1);  // wall_time
  put_fixed(e, now_seconds());
  e += static_cast<char>(2 << 3 | 0);  // step
  put_varint(e, static_cast<std::uint64_t>(step));
  return e;
}

std::uint32_t masked_crc(const void* data, std::size_t bytes) {
  return std::rotr(crc32c(data, bytes), 15) + 0xa282ead8u;
}

}  // namespace

EventFile::EventFile(const std::filesystem::path& dir, std::int64_t first_step) {
  std::error_code failed;  // told by the first record, which then finds no file
  std::filesystem::create_directories(dir, failed);
  file_.emplace(dir / fmt::format("events.out.tfevents.{:010}.{}.{}.0",
                                  static_cast<std::int64_t>(now_seconds()), host_name(), getpid()),
                "TensorBoard's events");
  std::string version = event_head(0);
  put_string(version, 3, "brain.Event:2");
  record(version);
  // A session that starts: a reader forgets the points from its step on.
  std::string start = event_head(first_step);
  put_string(start, 7, {1 << 3 | 0, 1});
  record(start);
}

void EventFile::record(const std::string& payload) {
  // TFRecord: length, its checksum, the payload, its checksum. Checksums are masked, as they may be part of what is
  // summed.
  std::string r;
  put_fixed(r, static_cast<std::uint64_t>(payload.size()));
  put_fixed(r, masked_crc(r.data(), 8));
  r += payload;
  put_fixed(r, masked_crc(payload.data(), payload.size()));
  file_->append(r);
}

void EventFile::scalars(std::int64_t step, const std::vector<std::pair<std::string, double>>& values) {
  std::string summary;
  for (const auto& [tag, value] : values) {
    std::string v;
    put_string(v, 1, tag);
    v += static_cast<char>(2 << 3 | 5);  // simple_value
    put_fixed(v, static_cast<float>(value));
    put_string(summary, 1, v);
  }
  std::string event = event_head(step);
  put_string(event, 5, summary);
  record(event);
}

}  // namespace upmoe
