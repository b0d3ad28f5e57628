#include "data/shard_writer.h"

#include <algorithm>
#include <cstring>

#include "data/crc.h"
#include "data/hdf5_file.h"
#include "data/posix_file.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kReadBlock = std::size_t{1} << 20, kWriteBlock = std::size_t{64} << 20;

// Each block is a sign of life: a slow disk is not a hang.
void write_in_blocks(DirectFile& file, std::uint64_t offset, std::span<const std::byte> values) {
  while (!values.empty()) {
    const std::span<const std::byte> block = values.first(std::min(values.size(), kWriteBlock));
    file.write(offset, block);
    watchdog::heartbeat();
    offset += block.size();
    values = values.subspan(block.size());
  }
}

// Reads a file from front to back: the checksum of all of it and, on the way, of stretches.
class Reader {
 public:
  explicit Reader(const fs::path& path) : file_(PosixFile::open_read(path)), block_(kReadBlock) {}

  // visit(bytes) for what lies between the place reached so far and `end`.
  template <class Visit>
  void advance(std::uint64_t end, const Visit& visit) {
    while (at_ < end) {
      const std::span<std::byte> bytes =
          std::span(block_).first(static_cast<std::size_t>(std::min<std::uint64_t>(kReadBlock, end - at_)));
      file_.read(at_, bytes);
      whole_ = crc32c(bytes.data(), bytes.size(), whole_);
      visit(std::span<const std::byte>(bytes));
      watchdog::heartbeat();
      at_ += bytes.size();
    }
  }
  void skip(std::uint64_t end) {
    advance(end, [](std::span<const std::byte>) {});
  }
  std::uint64_t size() const { return file_.size(); }
  std::uint32_t crc_so_far() const { return whole_; }

 private:
  PosixFile file_;
  std::vector<std::byte> block_;
  std::uint64_t at_ = 0;
  std::uint32_t whole_ = 0;
};

}  // namespace

ShardWriter::ShardWriter(const fs::path& folder, int rank, const std::vector<StorePiece>& pieces)
    : pieces_(pieces), name_(fmt::format("shard_{:05}.h5", rank)), path_(folder / name_) {
  lay_out();
  file_.emplace(path_);
}

void ShardWriter::lay_out() {
  Hdf5Writer hdf5(path_);
  for (const StorePiece& p : pieces_) {
    StoredPiece stored;
    stored.dataset = "/" + p.kind + "/" + p.tensor;
    stored.boxes = p.boxes;
    stored.offset = hdf5.reserve_flat(stored.dataset, p.values.dtype, p.values.elements());
    offsets_.push_back(stored.offset);
    const bool fresh =
        shard_.tensors.emplace(std::pair(p.tensor, p.kind), StoredTensor{p.global, p.values.dtype, {stored}})
            .second;
    UPMOE_CHECK(fresh, "{} ({}) given twice", p.tensor, p.kind);
  }
  hdf5.close();
}

void ShardWriter::write_values() {
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const ConstTensorView& values = pieces_[i].values;
    if (values.data == nullptr || values.bytes() == 0) continue;
    write_in_blocks(*file_, offsets_[i], {values.data, values.bytes()});
    written_.push_back({offsets_[i], values.bytes(), 0, values.data});
  }
}

void ShardWriter::put(const StoreBlock& block, std::span<const std::byte> values) {
  const StorePiece& p = pieces_.at(block.piece);
  const std::size_t element = size_of(p.values.dtype);
  const Range r = block.range;
  UPMOE_CHECK(0 <= r.begin && r.begin <= r.end && r.end <= p.values.elements() &&
                  values.size() == static_cast<std::size_t>(r.size()) * element,
              "{}: {} bytes for elements {} to {} of {}", p.tensor, values.size(), r.begin, r.end,
              p.values.elements());
  if (values.empty()) return;
  const std::uint64_t offset = offsets_[block.piece] + static_cast<std::uint64_t>(r.begin) * element;
  write_in_blocks(*file_, offset, values);
  written_.push_back({offset, values.size(), crc32c(values.data(), values.size()), nullptr});
}

Manifest ShardWriter::finish() {
  std::sort(written_.begin(), written_.end(),
            [](const Written& a, const Written& b) { return a.offset < b.offset; });
  require_whole();
  watchdog::heartbeat();
  file_->sync();
  watchdog::heartbeat();
  file_.reset();
  shard_.files.push_back(read_back());
  return std::move(shard_);
}

// `written_` is in the order of the file: what belongs to a piece must follow without gap or overlap.
void ShardWriter::require_whole() const {
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    std::uint64_t at = offsets_[i];
    const std::uint64_t end = at + pieces_[i].values.bytes();
    auto next = std::partition_point(written_.begin(), written_.end(),
                                     [&](const Written& w) { return w.offset < at; });
    for (; next != written_.end() && next->offset == at && at < end; ++next) at += next->bytes;
    const bool again = next != written_.end() && next->offset < end;
    UPMOE_CHECK(at == end && !again, "{}: the bytes at {} were written {}", pieces_[i].tensor,
                again ? next->offset : at, again ? "twice or after a gap" : "by nobody");
  }
}

// What the disk holds is compared with what was meant, in one pass over the file. Values that are still in memory are
// compared byte by byte, blocks that are not by their checksums; what HDF5 wrote around them only counts in the file's.
StoredFile ShardWriter::read_back() const {
  Reader reader(path_);
  for (const Written& w : written_) {
    reader.skip(w.offset);
    std::uint32_t crc = 0;
    const std::byte* expected = w.values;
    bool equal = true;
    reader.advance(w.offset + w.bytes, [&](std::span<const std::byte> found) {
      if (expected == nullptr) {
        crc = crc32c(found.data(), found.size(), crc);
      } else {
        equal = equal && std::memcmp(found.data(), expected, found.size()) == 0;
        expected += found.size();
      }
    });
    if (!equal || crc != w.crc)
      fail(ExitCode::kBadInput,
           "{}: bytes {} to {} are not what was written; the disk may be full or failing", path_.string(),
           w.offset, w.offset + w.bytes);
  }
  const std::uint64_t size = reader.size();
  reader.skip(size);
  return {name_, size, reader.crc_so_far()};
}

}  // namespace upmoe
