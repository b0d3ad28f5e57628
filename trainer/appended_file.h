#pragma once
// A file that grows record by record beside a training that goes on whatever the disk does: what a full disk refuses
// is kept, and written when there is room again. No record stands half in it but the last one of a process that was
// killed.

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

namespace upmoe {

class AppendedFile {
 public:
  // Opens it behind what it holds; `what` its records are, for words: "metrics". Neither throws: a warning says once
  // that writing fails, a line that it goes again.
  AppendedFile(std::filesystem::path path, std::string what);
  ~AppendedFile();  // tries once more; what cannot be written is told, and no part of a record stays behind
  AppendedFile(const AppendedFile&) = delete;
  AppendedFile& operator=(const AppendedFile&) = delete;
  void append(const std::string& record);
  const std::filesystem::path& path() const { return path_; }

 private:
  bool write_pending();
  void cut_back();  // to whole records

  std::filesystem::path path_;
  std::string what_, pending_;  // not written yet
  std::ofstream out_;
  std::uint64_t written_ = 0;  // bytes, of whole records
  bool failing_ = false, lost_ = false;
};

}  // namespace upmoe
