#pragma once
// How both halves of Hdf5Structure take an HDF5 file's blocks apart; for its sources alone.

#include <algorithm>
#include <cstring>

#include "data/hdf5_structure.h"

namespace upmoe::hdf5 {

constexpr std::uint64_t kUndefined = ~std::uint64_t{0};  // an address that leads nowhere
constexpr std::uint64_t kLongestText = 4096;             // of names and texts
// Types of messages (IV.A.2).
constexpr unsigned kDataspace = 0x1, kLinkInfo = 0x2, kDatatype = 0x3, kLink = 0x6, kExternalFiles = 0x7,
                   kLayout = 0x8, kFilters = 0xb, kAttribute = 0xc, kContinuation = 0x10, kSymbolTable = 0x11,
                   kAttributeInfo = 0x15;

}  // namespace upmoe::hdf5

namespace upmoe {

// Takes numbers and stretches off the front of some bytes; what is missing makes the file a damaged one.
class Hdf5Structure::Cursor {
 public:
  Cursor(const Hdf5Structure& owner, std::string_view bytes) : owner_(owner), left_(bytes) {}
  std::string_view take(std::uint64_t count) {
    if (count > left_.size()) owner_.damaged("a part of its description is cut short");
    const std::string_view taken = left_.substr(0, static_cast<std::size_t>(count));
    left_.remove_prefix(taken.size());
    return taken;
  }
  void skip(std::uint64_t count) { take(count); }
  std::uint64_t number(std::size_t count) {  // little-endian, of 1 to 8 bytes
    std::uint64_t value = 0;
    const std::string_view taken = take(count);
    std::memcpy(&value, taken.data(), count);
    return value;
  }
  std::uint64_t left() const { return left_.size(); }
  std::string rest() { return std::string(take(left_.size())); }

 private:
  const Hdf5Structure& owner_;
  std::string_view left_;
};

}  // namespace upmoe
