#pragma once
// How output appears under its name complete or not at all: it is made under another name and then renamed. The
// one mechanism below what the program writes for others to read (staged_directory.h, store_writer.h), which
// differ in what the other name is, in whose things may lie there, and in what makes way for the result.

#include <filesystem>
#include <functional>

namespace upmoe {

enum class Existing { kStays, kReplaced };  // under the final name. kReplaced: a file, or an empty folder

// fsyncs `partial` (of a folder: the names in it, not its files), renames it to `target`, and fsyncs that name.
// Throws Error(kBadInput) when something stands there that is not replaced. After the rename there is no
// error: false, and a warning, when only a power cut could still take the name away.
bool give_name(const std::filesystem::path& partial, const std::filesystem::path& target, Existing existing);

// A folder that is filled under `path` and removed again unless it got the name `target`.
class PartialFolder {
 public:
  using Remove = std::function<void(const std::filesystem::path&)>;  // may leave what is not its own
  PartialFolder(std::filesystem::path path, std::filesystem::path target, Existing existing, Remove remove);
  ~PartialFolder();
  PartialFolder(const PartialFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  const std::filesystem::path& target() const { return target_; }
  void create();  // path(); must not exist
  bool commit();  // give_name
  bool committed() const { return committed_; }

 private:
  std::filesystem::path path_, target_;
  Existing existing_;
  Remove remove_;
  bool made_ = false, committed_ = false;
};

}  // namespace upmoe
