// What a layer of Qwen1.5-MoE-A2.7B keeps for backward under each train.recompute, on the dry device: the
// column of docs/gpu.md.

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <string>

#include "parallel/self_comm.h"
#include "tests/support/full_size.h"
#include "trainer/rank_model.h"

namespace upmoe {
namespace {

ModelConfig one_layer() {
  ModelConfig c = full_size();
  c.vocab_size = 256;  // the ends of the model are not run
  c.num_hidden_layers = 1;
  return c;
}

// Bytes of a token, with those of the block's input.
double kept(Recompute recompute) {
  const std::int64_t tokens = 4096;
  const Device dry{DeviceType::kDry, 0};
  const std::unique_ptr<Communicator> world = make_self_communicator();
  RankModel model(one_layer(), MeshSpec{}, *world, dry,
                  {.dtype = DType::kBF16, .grad_dtype = DType::kBF16, .recompute = recompute});
  const Block& block = model.chunks.front().blocks.front();
  Arena keep(dry, std::size_t{1} << 40, "activations");
  Exec& ex = model.memory.exec;
  const auto view = [&](Shape shape, DType dtype) { return TensorView{nullptr, shape, dtype, dry}; };
  const TensorView x = view({tokens, 2048}, DType::kBF16), y = x, g = x;
  Block::Saved saved;
  block.forward(ex, {y, x, x}, {x}, {view({tokens}, DType::kI32), {}, 2048}, keep, saved);
  const std::size_t used = keep.used();
  saved.balance.terms.aux = view({60}, DType::kF32);
  block.backward(ex, g, keep, saved);
  EXPECT_EQ(keep.used(), used);
  EXPECT_EQ(model.memory.scratch.used(), 0u);
  return static_cast<double>(used + x.bytes()) / static_cast<double>(tokens);
}

// The number before " kB |" in the row of the table.
long documented(const std::string& text, const std::string& recompute) {
  const std::size_t row = text.find("\n| `" + recompute + "` |"), end = text.find(" kB |", row);
  if (row == std::string::npos || end == std::string::npos) return -1;
  return std::stol(text.substr(text.rfind(' ', end - 1), end));
}

TEST(RecomputeMemory, IsWhatTheDocumentSays) {
  std::ifstream file(UPMOE_SOURCE_DIR "/docs/gpu.md");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  for (const auto& [recompute, name] : kNames<Recompute>.built)
    EXPECT_EQ(std::lround(kept(recompute) / 1000), documented(text, name)) << name;
}

}  // namespace
}  // namespace upmoe
