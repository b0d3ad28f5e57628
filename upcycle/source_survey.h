#pragma once
// One pass over the dense model before anything is written: what its matrices' values are like, whether all
// of them are finite, and checksums of its files.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "parallel/communicator.h"
#include "upcycle/dense_source.h"

namespace upmoe {

struct Moments {
  double mean = 0, std = 0;
};

struct SourceSurvey {
  std::map<std::string, Moments> moments;  // by tensor
  struct File {
    std::string name;
    std::uint64_t bytes = 0;
    std::uint32_t crc32c = 0;  // of the whole file
  };
  std::vector<File> files;
  std::vector<std::string> all_zero;  // matrices without any non-zero value: suspicious, not wrong
};

// Collective: the ranks share the reading, and the result is the same, to the bit, for any number of them.
// Throws Error(kBadInput) with a count for each tensor that holds NaN or infinite values.
SourceSurvey survey_source(const DenseSource& source, Communicator& comm, int threads,
                           bool show_progress = false);

// The CRC-32C of a text from those of its two parts, the second one `second_bytes` long.
std::uint32_t combine_crc32c(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes);

}  // namespace upmoe
