// What a run learns does not depend on the format that its tokens lie in.

#include "data/token_file.h"
#include "tests/support/megatron_set.h"
#include "tests/trainer/whole_run.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kSteps = 6;

class TokenFormats : public test::WholeRun {
 protected:
  void SetUp() override {
    WholeRun::SetUp();
    const auto file = open_token_file(dir_ / "tokens.h5");
    tokens_.resize(static_cast<std::size_t>(file->num_tokens()));
    file->read(0, tokens_);
    write_token_file(dir_ / "tokens.h5", tokens_, ends_, test::kVocab);
    MegatronSet::of<std::uint16_t>(tokens_, ends_, 8).write(dir_ / "narrow");
    MegatronSet::of<std::int32_t>(tokens_, ends_, 4).write(dir_ / "wide");
  }
  void train_on(const std::string& tokens, const std::string& name, std::int64_t steps = kSteps) const {
    RunConfig c = config(name, steps, 2);
    c.data.train = {{(dir_ / tokens).string(), 1.0}};
    c.data.valid = {{"", (dir_ / tokens).string()}};
    c.data.shuffle = true;
    c.data.mask_documents = true;
    c.train.eval_every = 2;
    c.train.eval_sequences = 8;
    run_in_threads(2, [&](Communicator& world) { EXPECT_EQ(train(c, world, {}), 0); });
  }

  std::vector<std::uint32_t> tokens_;
  const std::vector<std::int64_t> ends_{5, 6, 40, 1000, 4000};
};

TEST_F(TokenFormats, ARunIsBitwiseTheSame) {
  train_on("tokens.h5", "hdf5");
  for (const char* tokens : {"narrow.bin", "wide.idx"}) {
    const std::string name = std::string("on_") + tokens;
    train_on(tokens, name);
    EXPECT_EQ(losses(name), losses("hdf5"));
    EXPECT_EQ(losses(name).size(), static_cast<std::size_t>(kSteps));
    EXPECT_EQ(contents(checkpoint(name, kSteps)), contents(checkpoint("hdf5", kSteps)));
  }
}

TEST_F(TokenFormats, AResumeOnAnIndexedDataSetIsBitwise) {
  train_on("narrow.bin", "whole");
  train_on("narrow.bin", "parts", kSteps / 2);
  train_on("narrow.idx", "parts");  // either name of the one set
  EXPECT_EQ(losses("whole"), losses("parts"));
  EXPECT_EQ(contents(checkpoint("whole", kSteps)), contents(checkpoint("parts", kSteps)));
}

TEST_F(TokenFormats, AResumeOnOtherDocumentsIsRefused) {
  train_on("narrow.bin", "parts", kSteps / 2);
  const std::vector<std::int64_t> others{5, 7, 40, 1000, 4000};
  MegatronSet::of<std::uint16_t>(tokens_, others, 8).write(dir_ / "narrow");
  try {
    train_on("narrow.bin", "parts");
    ADD_FAILURE() << "the run went on";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("have other contents"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace upmoe
