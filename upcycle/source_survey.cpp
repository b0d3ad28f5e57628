#include "upcycle/source_survey.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>

#include "data/crc.h"
#include "parallel/layout.h"
#include "parallel/watchdog.h"
#include "upcycle/progress.h"
#include "upcycle/workers.h"

namespace upmoe {
namespace {

constexpr std::uint64_t kBlockBytes = 8u << 20;

struct Block {  // part of one tensor
  const SafetensorsFile* file;
  const SafetensorsEntry* entry;
  std::uint64_t offset, bytes;
  bool used;  // false: only its checksum counts
};

// Sums of one block: also what the ranks exchange, as columns of one fp64 matrix (whole numbers stay exact).
struct BlockSums {
  double sum = 0, sum_of_squares = 0, non_finite = 0, crc = 0;
};
constexpr std::int64_t kColumns = 4;

std::vector<const SafetensorsFile*> files_of(const DenseSource& source) {
  std::vector<const SafetensorsFile*> files;
  for (const SafetensorsEntry* entry : source.model().tensors()) {
    const SafetensorsFile* file = source.model().locate(entry->name).first;
    if (std::find(files.begin(), files.end(), file) == files.end()) files.push_back(file);
  }
  std::sort(files.begin(), files.end(), [](const auto* a, const auto* b) { return a->path() < b->path(); });
  return files;
}

std::vector<Block> blocks_of(const HfModel& model, const std::vector<const SafetensorsFile*>& files) {
  std::vector<Block> blocks;
  for (const SafetensorsFile* file : files) {
    for (const SafetensorsEntry& entry : file->header().entries) {
      const std::uint64_t size = entry.end - entry.begin;
      for (std::uint64_t at = 0; at < size; at += kBlockBytes) {
        blocks.push_back({file, &entry, at, std::min(kBlockBytes, size - at), model.uses(entry.name)});
      }
    }
  }
  return blocks;
}

// Eight running sums in a fixed pattern: the order of additions is part of the result, and eight can go side by side.
template <class T>
BlockSums sums_of(const std::byte* bytes, std::size_t count) {
  constexpr std::size_t kLanes = 8;
  double sum[kLanes] = {}, square[kLanes] = {};
  std::size_t bad = 0;
  const T* x = reinterpret_cast<const T*>(bytes);
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t l = 0; l < kLanes; ++l) {
      const double v = to_float(x[i + l]);
      sum[l] += v;
      square[l] += v * v;
    }
  }
  for (; i < count; ++i) {
    const double v = to_float(x[i]);
    sum[0] += v;
    square[0] += v * v;
  }
  BlockSums total;
  for (std::size_t l = 0; l < kLanes; ++l) {
    total.sum += sum[l];
    total.sum_of_squares += square[l];
  }
  if (!std::isfinite(total.sum_of_squares)) {  // squares of finite fp32 values cannot overflow an fp64 sum
    for (std::size_t k = 0; k < count; ++k) bad += std::isfinite(to_float(x[k])) ? 0u : 1u;
    total.sum = total.sum_of_squares = 0;
  }
  total.non_finite = static_cast<double>(bad);
  return total;
}

BlockSums survey_block(const Block& block, DType dtype, std::vector<std::byte>& buffer) {
  buffer.resize(block.bytes);
  block.file->read(*block.entry, block.offset, buffer);
  const std::size_t count = buffer.size() / size_of(dtype);
  BlockSums sums;
  if (block.used)
    sums = dtype == DType::kBF16 ? sums_of<bf16>(buffer.data(), count) : sums_of<float>(buffer.data(), count);
  sums.crc = crc32c(buffer.data(), buffer.size());
  return sums;
}

// The survey is cut into blocks of one size, whatever the ranks and threads: moments are sums of blocks in the order of
// the files, and the same to the bit however many took part.
// Every block by one rank, all blocks on every rank.
std::vector<BlockSums> survey_blocks(const std::vector<Block>& blocks, DType dtype, Communicator& comm,
                                     int threads, bool show_progress) {
  std::vector<BlockSums> sums(blocks.size());
  run_agreed(comm, [&] {
    const Range mine = balanced(static_cast<std::int64_t>(blocks.size()), comm.size(), comm.rank());
    std::atomic<std::int64_t> next{mine.begin};
    std::uint64_t bytes = 0;
    for (std::int64_t i = mine.begin; i < mine.end; ++i) bytes += blocks[static_cast<std::size_t>(i)].bytes;
    Progress progress("reading the source", bytes, show_progress);
    run_workers(threads, [&](const std::atomic<bool>& stop) {
      std::vector<std::byte> buffer;
      for (std::int64_t i = next++; i < mine.end && !stop; i = next++) {
        const auto at = static_cast<std::size_t>(i);
        sums[at] = survey_block(blocks[at], dtype, buffer);
        progress.add(blocks[at].bytes);
        watchdog::heartbeat();
      }
    });
    progress.finish();
  });
  static_assert(sizeof(BlockSums) == kColumns * sizeof(double));
  if (blocks.empty()) return sums;
  // The other ranks' entries are zero here, and adding zeros changes nothing.
  comm.all_reduce(
      host_view(reinterpret_cast<double*>(sums.data()), {static_cast<std::int64_t>(sums.size()), kColumns}),
      ReduceOp::kSum);
  return sums;
}

std::uint32_t crc_of_head(const SafetensorsFile& file) {
  std::vector<char> head(file.header().data_begin);
  std::ifstream in(file.path(), std::ios::binary);
  if (!in.read(head.data(), static_cast<std::streamsize>(head.size()))) {
    fail(ExitCode::kBadInput, "{}: cannot read the header", file.path().string());
  }
  return crc32c(head.data(), head.size());
}

struct TensorSums {
  const SafetensorsFile* file = nullptr;
  std::int64_t elements = 0;
  bool matrix = false;
  BlockSums sums;
};

void refuse_non_finite(const std::map<std::string, TensorSums>& tensors) {
  std::string list;
  int count = 0;
  for (const auto& [name, t] : tensors) {
    if (t.sums.non_finite == 0) continue;
    if (++count <= 20) {
      list += fmt::format("\n  {}: {}: {} of {} values", t.file->path().string(), name,
                          static_cast<std::int64_t>(t.sums.non_finite), t.elements);
    }
  }
  if (count > 20) list += fmt::format("\n  and {} more tensors", count - 20);
  if (count > 0) fail(ExitCode::kBadInput, "the dense model holds NaN or infinite weights:{}", list);
}

}  // namespace

SourceSurvey survey_source(const DenseSource& source, Communicator& comm, int threads, bool show_progress) {
  const std::vector<const SafetensorsFile*> files = files_of(source);
  const std::vector<Block> blocks = blocks_of(source.model(), files);
  const std::vector<BlockSums> sums = survey_blocks(blocks, source.dtype(), comm, threads, show_progress);

  SourceSurvey survey;
  std::map<const SafetensorsFile*, std::size_t> file_index;
  run_agreed(comm, [&] {
    for (const SafetensorsFile* file : files) {
      file_index[file] = survey.files.size();
      survey.files.push_back(
          {file->path().filename().string(), file->header().data_begin, crc_of_head(*file)});
    }
  });
  std::map<std::string, TensorSums> tensors;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const Block& block = blocks[i];
    SourceSurvey::File& file = survey.files[file_index[block.file]];
    file.crc32c = combine_crc32c(file.crc32c, static_cast<std::uint32_t>(sums[i].crc), block.bytes);
    file.bytes += block.bytes;
    if (!block.used) continue;
    TensorSums& t = tensors[block.entry->name];
    t.file = block.file;
    t.elements += static_cast<std::int64_t>(block.bytes / size_of(source.dtype()));
    t.matrix = block.entry->shape.size() > 1;
    t.sums.sum += sums[i].sum;
    t.sums.sum_of_squares += sums[i].sum_of_squares;
    t.sums.non_finite += sums[i].non_finite;
  }
  run_agreed(comm, [&] {
    if (comm.rank() == 0) refuse_non_finite(tensors);  // all ranks know; one tells
  });
  for (const auto& [name, t] : tensors) {
    const auto n = static_cast<double>(t.elements);
    // The deviation is E[x^2] - mean^2, in fp64: weights have means near 0, so nothing is lost by the difference;
    // rounding may leave it just below 0, which the max takes away.
    const double mean = t.sums.sum / n;
    survey.moments[name] = {mean, std::sqrt(std::max(0.0, t.sums.sum_of_squares / n - mean * mean))};
    if (t.matrix && t.sums.sum_of_squares == 0) survey.all_zero.push_back(name);
  }
  return survey;
}

// Appending n zero bytes multiplies a CRC's remainder by x^(8n) modulo the polynomial; CRC(AB) is then the remainder
// of A so shifted plus that of B. Polynomials over GF(2) with x^0 in the upper bit, as in the reflected CRC.
std::uint32_t combine_crc32c(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes) {
  constexpr std::uint32_t kPolynomial = 0x82F63B78u;
  const auto multiply = [](std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (std::uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
      if ((a & bit) != 0) product ^= b;
      b = (b & 1u) != 0 ? (b >> 1) ^ kPolynomial : b >> 1;  // times x
    }
    return product;
  };
  std::uint32_t power = 0x00800000u;  // x^8, one byte
  std::uint32_t shift = 0x80000000u;  // 1
  for (std::uint64_t n = second_bytes; n != 0; n >>= 1) {
    if ((n & 1u) != 0) shift = multiply(shift, power);
    power = multiply(power, power);
  }
  return multiply(shift, first) ^ second;
}

}  // namespace upmoe
