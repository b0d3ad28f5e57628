#pragma once
// An indexed data set of Megatron-LM, byte by byte, so that a test can make any part of it wrong.

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <vector>

namespace upmoe {

struct MegatronSet {
  std::string mark{"MMIDIDX\0\0", 9};
  std::uint64_t version = 1;
  std::uint8_t code = 4;  // int32
  std::vector<std::int32_t> lengths;
  std::vector<std::int64_t> begins, boundaries;
  std::string tokens;

  // Documents of one sequence each, which end at `ends`; T: what `code` says.
  template <class T = std::int32_t>
  static MegatronSet of(std::span<const std::uint32_t> tokens, std::span<const std::int64_t> ends,
                        std::uint8_t code = 4) {
    MegatronSet set;
    set.code = code;
    set.boundaries = {0};
    std::int64_t begin = 0;
    for (const std::int64_t end : ends) {
      set.lengths.push_back(static_cast<std::int32_t>(end - begin));
      set.begins.push_back(begin * static_cast<std::int64_t>(sizeof(T)));
      set.boundaries.push_back(static_cast<std::int64_t>(set.lengths.size()));
      begin = end;
    }
    for (const std::uint32_t token : tokens) set.add(static_cast<T>(token));
    return set;
  }
  template <class T>
  void add(T token) {
    tokens.append(reinterpret_cast<const char*>(&token), sizeof(T));
  }
  std::string index() const {
    std::string out = mark;
    const auto put = [&](const void* data, std::size_t bytes) {
      out.append(static_cast<const char*>(data), bytes);
    };
    const std::uint64_t counts[] = {lengths.size(), boundaries.size()};
    put(&version, sizeof(version));
    put(&code, sizeof(code));
    put(counts, sizeof(counts));
    put(lengths.data(), lengths.size() * sizeof(lengths[0]));
    put(begins.data(), begins.size() * sizeof(begins[0]));
    put(boundaries.data(), boundaries.size() * sizeof(boundaries[0]));
    return out;
  }
  // PREFIX.bin and PREFIX.idx; returns the first.
  std::filesystem::path write(const std::filesystem::path& prefix) const {
    const auto put = [&](const char* end, const std::string& bytes) {
      std::filesystem::path path = prefix;
      path += end;
      std::ofstream(path, std::ios::binary) << bytes;
      return path;
    };
    put(".idx", index());
    return put(".bin", tokens);
  }
};

}  // namespace upmoe
