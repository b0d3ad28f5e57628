// The "run" object of a manifest: the same bytes as ever, and of a broken one the file and the key are told.

#include "data/run_metadata.h"

#include <nlohmann/json.hpp>

#include "data/model_source.h"
#include "tests/data/stores.h"

namespace upmoe::test {
namespace {

RunMetadata of_training() {
  return {.step = 12,
          .samples = 96,
          .tokens = 1536,
          .model_config = "{\"a\": 1}\n",
          .source = "/models/dense",
          .data_fingerprint = "0a",
          .config = "run: {dir: r}\n",
          .mesh = "ep 2",
          .source_digest = "ff",
          .teacher_digest = {}};
}

TEST(RunMetadata, HasTheseBytes) {
  EXPECT_EQ(run_metadata_json(of_training()),
            R"({"config":"run: {dir: r}\n","data_fingerprint":"0a","mesh":"ep 2",)"
            R"("model_config":"{\"a\": 1}\n","samples":96,"source":"/models/dense","source_digest":"ff",)"
            R"("step":12,"tokens":1536})");
  RunMetadata upcycled;
  upcycled.model_config = "{}";
  upcycled.source = "/models/dense";
  EXPECT_EQ(run_metadata_json(upcycled), R"({"data_fingerprint":"","model_config":"{}","samples":0,)"
                                         R"("source":"/models/dense","step":0,"tokens":0})");
}

TEST(RunMetadata, ComesBack) {
  const RunMetadata before = of_training();
  const RunMetadata after = parse_run_metadata(run_metadata_json(before), "here");
  EXPECT_EQ(run_metadata_json(after), run_metadata_json(before));
  EXPECT_EQ(after.tokens, 1536);
  EXPECT_EQ(after.source_digest, "ff");
  EXPECT_FALSE(after.teacher_digest);
  RunMetadata taught = before;
  taught.teacher_digest = "ee";
  EXPECT_EQ(parse_run_metadata(run_metadata_json(taught), "here").teacher_digest, "ee");
  const RunMetadata upcycled = parse_run_metadata(run_metadata_json({}), "here");
  EXPECT_FALSE(upcycled.config || upcycled.mesh || upcycled.source_digest || upcycled.teacher_digest);
}

TEST(RunMetadata, KeysOfNewerProgramsArePassedOver) {
  nlohmann::json run = nlohmann::json::parse(run_metadata_json(of_training()));
  run["later"] = {1, 2};
  EXPECT_EQ(parse_run_metadata(run.dump(), "here").step, 12);
}

void expect_refused(const std::string& text, const std::string& words) {
  try {
    parse_run_metadata(text, "dir/manifest.json");
    FAIL() << text;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    const std::string message = e.what();
    EXPECT_TRUE(message.starts_with("dir/manifest.json: ")) << message;
    EXPECT_NE(message.find(words), std::string::npos) << message;
  }
}

TEST(RunMetadata, IsAnObject) {
  for (const char* text : {"", "{", "[]", "7", "null", "\"step\""})
    expect_refused(text, "'run' is not an object");
}

TEST(RunMetadata, EveryKeyIsThere) {
  const nlohmann::json good = nlohmann::json::parse(run_metadata_json(of_training()));
  for (const char* key : {"step", "samples", "tokens", "model_config", "source", "data_fingerprint"}) {
    nlohmann::json bad = good;
    bad.erase(key);
    expect_refused(bad.dump(), fmt::format("run.{} is missing", key));
  }
}

TEST(RunMetadata, EveryKeyHasItsType) {
  const nlohmann::json good = nlohmann::json::parse(run_metadata_json(of_training()));
  for (const char* key : {"step", "samples", "tokens"})
    for (const nlohmann::json& value :
         {nlohmann::json(-1), nlohmann::json(0.5), nlohmann::json("1"), nlohmann::json(),
          nlohmann::json(true), nlohmann::json(std::uint64_t{1} << 63), nlohmann::json::array({1})}) {
      nlohmann::json bad = good;
      bad[key] = value;
      expect_refused(bad.dump(), fmt::format("run.{} is ", key));
      expect_refused(bad.dump(), "expected a count");
    }
  for (const char* key : {"model_config", "source", "data_fingerprint", "config", "mesh", "source_digest"})
    for (const nlohmann::json& value : {nlohmann::json(1), nlohmann::json(), nlohmann::json::object()}) {
      nlohmann::json bad = good;
      bad[key] = value;
      expect_refused(bad.dump(), fmt::format("run.{} is ", key));
      expect_refused(bad.dump(), "expected a string");
    }
}

TEST_F(Stores, AStoreOfNoRunIsNoModel) {
  write_test_store(root / "s", 1);  // its object has a step alone
  const auto expect_refusal = [&](const auto& read) {
    try {
      read(root / "s");
      ADD_FAILURE() << "read a store of no run";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_EQ(std::string(e.what()), (root / "s/manifest.json").string() + ": run.samples is missing");
    }
  };
  expect_refusal(open_model);
  expect_refusal(config_of_model);
}

}  // namespace
}  // namespace upmoe::test
