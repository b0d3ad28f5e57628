// The keys of the configuration files, their ranges and defaults are a contract: they stand in
// frozen_keys.txt, and whoever changes one changes that file in the same commit.

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

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

}  // namespace
}  // namespace upmoe
