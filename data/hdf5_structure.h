#pragma once
// Where things lie in an HDF5 file, read without the HDF5 library: the library follows the addresses and
// lengths of a damaged file (it crashes, or allocates until nothing is left). Known here is what a token file
// needs: numbers and texts as attributes of the root group, and one-dimensional contiguous datasets in it, as
// every version of the library writes them. Every address and length is compared with the file before it is
// used; links to elsewhere, filters, external and virtual storage are refused.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "data/posix_file.h"

namespace upmoe {

struct Hdf5Type {
  enum class Kind { kInteger, kText, kVariableText, kOther };
  Kind kind = Kind::kOther;
  std::uint64_t bytes = 0;                       // of one element
  bool is_signed = false, little_endian = true;  // of integers
  bool whole = true;                             // integers: every bit counts
};

// Errors: Error(kBadInput) naming the file, what is wrong, and that it can be made anew.
class Hdf5Structure {
 public:
  explicit Hdf5Structure(const PosixFile& file);  // the file must outlive this
  bool has_attribute(const std::string& name) const { return attributes_.contains(name); }
  bool has_dataset(const std::string& name) const { return links_.contains(name); }
  std::int64_t integer(const std::string& attribute) const;
  std::string text(const std::string& attribute) const;  // at most 4096 bytes, without its padding

  struct Extent {
    std::uint64_t offset = 0;  // in the file
    std::int64_t elements = 0;
  };
  // A one-dimensional dataset of little-endian numbers that lies in this file in one piece and wholly.
  Extent contiguous(const std::string& dataset, std::uint64_t element_bytes, bool is_signed) const;

 private:
  struct Space {
    std::vector<std::uint64_t> dims;
    bool is_null = false;
    std::uint64_t elements() const;
  };
  struct Attribute {
    Hdf5Type type;
    Space space;
    std::string data;
  };
  struct Link {
    bool hard = true;
    std::uint64_t header = 0;  // address of the object
  };
  struct Message {
    unsigned type = 0;
    bool shared = false;
    std::string data;
  };
  class Cursor;

  [[noreturn]] void damaged(std::string_view what) const;
  [[noreturn]] void refuse(const char* what, const std::string& name, const std::string& why) const;
  std::string bytes(std::uint64_t address, std::uint64_t count) const;
  std::uint64_t find_root();
  std::vector<Message> messages_of(std::uint64_t header) const;
  void add_messages(const std::string& block, bool second_version, bool with_order,
                    std::vector<Message>& messages) const;
  void read_group(std::uint64_t header);
  void read_symbols(std::uint64_t tree, const std::string& names, int level, int& left);
  std::string heap_of_names(std::uint64_t address) const;
  void read_link(const Message& message);
  void read_attribute(const Message& message);
  Hdf5Type type_of(const std::string& data) const;
  Space space_of(const std::string& data) const;
  const Attribute& attribute(const std::string& name) const;
  std::string heap_text(const std::string& reference) const;

  const PosixFile& file_;
  std::uint64_t file_bytes_ = 0;
  std::uint64_t base_ = 0;  // where the superblock lies; addresses count from there
  bool dense_attributes_ = false;
  std::map<std::string, Attribute> attributes_;
  std::map<std::string, Link> links_;
};

}  // namespace upmoe
