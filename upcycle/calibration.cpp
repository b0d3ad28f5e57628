#include "upcycle/calibration.h"

#include <cstring>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

template <class T>
void put(std::string& bytes, const std::vector<T>& values) {
  const std::uint64_t count = values.size();
  bytes.append(reinterpret_cast<const char*>(&count), sizeof count);
  if (count > 0) bytes.append(reinterpret_cast<const char*>(values.data()), count * sizeof(T));
}

class Reader {
 public:
  explicit Reader(const std::string& bytes) : bytes_(bytes) {}
  bool done() const { return at_ == bytes_.size(); }
  template <class T>
  std::vector<T> take() {
    std::uint64_t count = 0;
    copy(&count, sizeof count);
    std::vector<T> values(count);
    if (count > 0) copy(values.data(), count * sizeof(T));
    return values;
  }

 private:
  void copy(void* to, std::size_t size) {
    UPMOE_CHECK(size <= bytes_.size() - at_, "a calibration of {} bytes ends early", bytes_.size());
    std::memcpy(to, bytes_.data() + at_, size);
    at_ += size;
  }
  const std::string& bytes_;
  std::size_t at_ = 0;
};

}  // namespace

std::string to_bytes(const Calibration& calibration) {
  std::string bytes;
  for (const Calibration::Layer& layer : calibration.layers) {
    put(bytes, layer.router_ED);
    put(bytes, layer.order);
  }
  return bytes;
}

Calibration calibration_from(const std::string& bytes) {
  Calibration calibration;
  for (Reader reader(bytes); !reader.done();) {
    Calibration::Layer& layer = calibration.layers.emplace_back();
    layer.router_ED = reader.take<float>();
    layer.order = reader.take<std::int32_t>();
  }
  return calibration;
}

}  // namespace upmoe
