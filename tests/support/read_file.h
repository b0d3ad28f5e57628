#pragma once

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace upmoe::test {

// Every byte; of a file that is not there, none.
inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace upmoe::test
