#include "parallel/texts.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "parallel/host.h"

namespace upmoe {

namespace {

std::size_t words_of(std::int64_t bytes) {  // what is exchanged are numbers of four bytes
  return static_cast<std::size_t>((bytes + 3) / 4);
}

}  // namespace

std::vector<std::string> gather_text(Communicator& comm, const std::string& mine) {
  const std::vector<std::int64_t> lengths = gather(comm, static_cast<std::int64_t>(mine.size()));
  // all_gather takes parts of one size: each text in as many words as the longest has.
  const std::size_t words = words_of(*std::max_element(lengths.begin(), lengths.end()));
  std::vector<std::int32_t> own(words), all(words * lengths.size());
  std::memcpy(own.data(), mine.data(), mine.size());
  const auto w = static_cast<std::int64_t>(words);
  comm.all_gather(host_view(all.data(), {comm.size(), w}), host_view(std::as_const(own).data(), {w})).wait();
  std::vector<std::string> texts;
  for (std::size_t r = 0; r < lengths.size(); ++r)
    texts.emplace_back(reinterpret_cast<const char*>(all.data() + r * words),
                       static_cast<std::size_t>(lengths[r]));
  return texts;
}

std::string broadcast_text(Communicator& comm, const std::string& text, int root) {
  auto length = static_cast<std::int64_t>(text.size());
  comm.broadcast(host_view(&length, {1}), root);
  std::vector<std::int32_t> words(words_of(length) + 1);  // at least one
  if (comm.rank() == root) std::memcpy(words.data(), text.data(), text.size());
  comm.broadcast(host_view(words.data(), {static_cast<std::int64_t>(words.size())}), root);
  return {reinterpret_cast<const char*>(words.data()), static_cast<std::size_t>(length)};
}

}  // namespace upmoe
