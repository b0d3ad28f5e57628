// Paths in configurations: what stands for something is filled in, and what has no value is refused.

#include "configs/path_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "configs/run_config.h"
#include "kernels/core/check.h"

namespace upmoe {
namespace {

using ::testing::HasSubstr;

class Paths : public testing::Test {
 protected:
  void SetUp() override {
    setenv("HOME", "/home/me", 1);
    setenv("UPMOE_TEST_PLACE", "/disk", 1);
    setenv("UPMOE_TEST_EMPTY", "", 1);
    unsetenv("UPMOE_TEST_UNSET");
  }
};

std::string expanded(const std::string& written) {
  const PathText text = expand_path(written);
  EXPECT_EQ(text.problem, "") << written;
  return text.path;
}

TEST_F(Paths, HomeAndVariablesAreFilledIn) {
  EXPECT_EQ(expanded("~"), "/home/me");
  EXPECT_EQ(expanded("~/runs/x"), "/home/me/runs/x");
  EXPECT_EQ(expanded("$HOME/x"), "/home/me/x");
  EXPECT_EQ(expanded("${HOME}x/$UPMOE_TEST_PLACE/y"), "/home/mex//disk/y");
  EXPECT_EQ(expanded("a~/b~"), "a~/b~");
  EXPECT_EQ(expanded("./~x"), "./~x");
  EXPECT_EQ(expanded("a$$b/$$HOME"), "a$b/$HOME");
  EXPECT_EQ(expanded("plain/path with spaces"), "plain/path with spaces");
}

TEST_F(Paths, WhatHasNoValueIsRefused) {
  for (const char* written : {"$UPMOE_TEST_UNSET/x", "${UPMOE_TEST_UNSET}", "$UPMOE_TEST_EMPTY/x", "a$",
                              "a${", "a${}", "a${HOME", "$1/x", "~other/x", "~x"}) {
    EXPECT_NE(expand_path(written).problem, "") << written;
    EXPECT_THAT(expand_path(written).problem, HasSubstr(written));
  }
}

TEST_F(Paths, WrittenTextReadsBack) {
  for (const char* path : {"/a/b", "$HOME", "~", "~x/y", "a$$b", "${X}", "./~"}) {
    const std::string again = expanded(path_as_text(path));
    EXPECT_EQ(again.substr(again.starts_with("./~") && *path == '~' ? 2 : 0), path);
  }
}

RunConfig with(const std::string& override) {
  return parse_run_config(
      "run: {dir: ~/r}\nmodel: {path: $UPMOE_TEST_PLACE/m}\n"
      "data: {train: [{path: '${UPMOE_TEST_PLACE}/t.h5'}, ~/u.h5], valid: '~/v.h5', seq_len: 4}\n"
      "train: {steps: 1, global_batch: 1, micro_batch: 1}\n",
      "r.yaml", {override});
}

TEST_F(Paths, EveryPathOfARunIsMeant) {
  const RunConfig run = with("run.seed=1");
  EXPECT_EQ(run.run.dir, "/home/me/r");
  EXPECT_EQ(run.model.path, "/disk/m");
  EXPECT_EQ(run.data.train.at(0).path, "/disk/t.h5");
  EXPECT_EQ(run.data.train.at(1).path, "/home/me/u.h5");
  EXPECT_EQ(run.data.valid.at(0).path, "/home/me/v.h5");
  EXPECT_EQ(with("data.valid={a: ~/w.h5}").data.valid.at(0).path, "/home/me/w.h5");
  EXPECT_EQ(with("run.dir=~/other").run.dir, "/home/me/other");
  for (const char* key : {"run.dir=", "model.path=", "data.train=", "data.valid="}) {
    try {
      with(std::string(key) + "$UPMOE_TEST_UNSET/x");
      ADD_FAILURE() << key;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage);
      EXPECT_THAT(e.what(), HasSubstr("UPMOE_TEST_UNSET"));
    }
  }
  const RunConfig odd = with("run.dir=a$$b");
  EXPECT_EQ(odd.run.dir, "a$b");
  EXPECT_EQ(parse_run_config(to_yaml(odd), "again", {}).run.dir, "a$b");
}

}  // namespace
}  // namespace upmoe
