// The keys of the configuration files, their ranges and defaults are a contract: they stand in
// frozen_keys.txt, and whoever changes one changes that file in the same commit.

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <utility>

#include "configs/run_config.h"
#include "configs/upcycle_config.h"

namespace upmoe {
namespace {

TEST(FrozenKeys, AreThoseOfTheFile) {
  const std::string path = std::string(UPMOE_SOURCE_DIR) + "/tests/configs/frozen_keys.txt";
  const std::string found =
      "# upmoe train\n" + run_config_reference() + "\n# upmoe upcycle\n" + upcycle_config_reference();
  std::ifstream in(path);
  ASSERT_TRUE(in) << path;
  std::stringstream expected;
  expected << in.rdbuf();
  EXPECT_EQ(found, expected.str()) << "If the change is meant, put this into " << path << ":\n" << found;
}

// `upmoe train --help` and `upmoe upcycle --help` print these: every key, each with a meaning.
TEST(FrozenKeys, HelpNamesEveryKeyWithItsMeaning) {
  for (const auto& [reference, help] : {std::pair{run_config_reference(), run_config_help()},
                                        {upcycle_config_reference(), upcycle_config_help()}}) {
    std::stringstream lines(reference);
    std::string line;
    while (std::getline(lines, line)) {
      const std::string key = line.substr(0, line.find(" : "));
      const std::size_t at = ("\n" + help).find("\n  " + key + " = ");
      ASSERT_NE(at, std::string::npos) << key;
      const std::size_t meaning = help.find("\n      ", at);
      ASSERT_NE(meaning, std::string::npos) << key;
      EXPECT_GT(help.find('\n', meaning + 1) - meaning, 12u) << key << " has no meaning";
    }
  }
}

}  // namespace
}  // namespace upmoe
