#pragma once
// What the operating system refused, in the words of an Error.

#include <filesystem>
#include <string>

#include "kernels/core/check.h"

namespace upmoe {

// An Error(kBadInput) that names the path, the system's reason and, where there is one, the cure.
class SystemError : public Error {
 public:
  SystemError(const std::filesystem::path& path, const std::string& what, int number);
  explicit SystemError(const std::filesystem::filesystem_error& e);
  int number() const { return number_; }  // errno
  bool is_missing() const;                // no such file, or a file where a folder should be
  bool is_no_space() const;               // a full disk, a quota, a limit of file sizes
  bool is_of_process() const;             // says nothing about the path: no memory, too many open files

 private:
  int number_;
};

// Runs `body`; what std::filesystem refuses in it becomes a SystemError: it is no fault of this program.
template <class Body>
decltype(auto) with_system_errors(const Body& body) {
  try {
    return body();
  } catch (const std::filesystem::filesystem_error& e) {
    throw SystemError(e);
  }
}

}  // namespace upmoe
