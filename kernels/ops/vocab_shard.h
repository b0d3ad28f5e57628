#pragma once
// Which tokens of the vocabulary a table's rows stand for, where the vocabulary is divided between ranks.

#include <cstdint>

namespace upmoe {

struct VocabShard {
  std::int64_t begin = 0;  // the token of the table's first row
  std::int64_t total = 0;  // size of the whole vocabulary; 0: the table is the whole vocabulary
};

}  // namespace upmoe
