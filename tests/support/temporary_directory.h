#pragma once
// A folder of its own for each test, gone with it.

#include <cstdlib>
#include <filesystem>
#include <string>

#include "kernels/core/check.h"

namespace upmoe::test {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "upmoe_test_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) fail(ExitCode::kFailure, "cannot make {}", name);
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace upmoe::test
