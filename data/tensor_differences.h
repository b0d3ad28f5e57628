#pragma once
// What is wrong with the tensors of a file, against those that it must hold: told all at once, in the same words
// whatever the file is of.

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "data/safetensors.h"

namespace upmoe {

class TensorDifferences {
 public:
  // A tensor that belongs there, and what was found under its name: null where nothing was.
  void expect(const std::string& name, const std::vector<std::int64_t>& shape, const SafetensorsEntry* found);
  bool expects(const std::string& name) const { return expected_.contains(name); }
  void add(const std::string& name, const std::string& what) { list_.push_back(name + ": " + what); }
  // Error(kBadInput): `what` and the list, the first of many.
  void throw_if_any(const std::string& what) const;

 private:
  std::set<std::string> expected_;
  std::vector<std::string> list_;
};

}  // namespace upmoe
