// Words of configurations: every value of an enum has one name, which is what files and the command line say.

#include <gtest/gtest.h>

#include <set>

#include "configs/families/traits.h"
#include "configs/model_traits.h"
#include "configs/run_config.h"
#include "configs/upcycle_config.h"

namespace upmoe {
namespace {

constexpr const char* kRun =
    "run: {dir: d}\nmodel: {path: m}\ndata: {train: a, seq_len: 4}\n"
    "train: {steps: 1, global_batch: 1, micro_batch: 1}\n";
constexpr const char* kRecipe =
    "target: {num_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 32, "
    "shared_expert_intermediate_size: 32}\n";

std::string run_with(const std::string& assignment) {
  return to_yaml(parse_run_config(kRun, "r", {assignment}));
}
std::string recipe_with(const std::string& assignment) {
  return to_yaml(parse_upcycle_config(kRecipe, "u", {"experts.method=virtual_group", assignment}));
}

// Enumerators count from 0 without a gap, so a table of all of them names 0 to n - 1 and nothing beyond.
template <class Enum>
void expect_complete() {
  const auto table = kNames<Enum>.built;
  std::set<std::string> names;
  for (std::size_t i = 0; i < table.size(); ++i) {
    const std::string name = name_of(static_cast<Enum>(i));
    EXPECT_TRUE(names.insert(name).second) << name;
    EXPECT_EQ(value_named<Enum>(name), static_cast<Enum>(i)) << name;
  }
  EXPECT_THROW(name_of(static_cast<Enum>(table.size())), Error);
  EXPECT_EQ(value_named<Enum>("no such name"), std::nullopt);
  for (const char* name : kNames<Enum>.planned) EXPECT_EQ(value_named<Enum>(name), std::nullopt) << name;
}

// Each name, given to `key`, is what the resolved file says again.
template <class Enum>
void expect_read(const std::string& key, std::string (*resolved)(const std::string&)) {
  expect_complete<Enum>();
  const std::string last = key.substr(key.find('.') + 1);
  for (const auto& [value, name] : kNames<Enum>.built)
    EXPECT_NE(resolved(key + "=" + name).find(last + ": " + name + "\n"), std::string::npos) << key << name;
}

TEST(Names, OfRuns) {
  expect_read<ModelInit>("model.init", run_with);
  expect_read<AuxKind>("router.aux_kind", run_with);
  expect_read<RouterDType>("router.dtype", run_with);
  expect_read<RouterScore>("router.score", run_with);
  expect_read<RouterKind>("router.kind", run_with);
  expect_read<CapacityPool>("router.capacity_pool", run_with);
  expect_read<DropBy>("router.drop", run_with);
  expect_read<Precision>("train.precision", run_with);
  expect_read<Precision>("parallel.reduce", run_with);
  expect_read<Recompute>("train.recompute", run_with);
  expect_read<OptimizerKind>("optimizer.name", run_with);
  expect_read<ScheduleKind>("schedule.name", run_with);
  expect_read<LoraTarget>("lora.targets", run_with);
  expect_read<DeviceChoice>("device", run_with);
}

TEST(Names, OfRecipes) {
  expect_read<ExpertMethod>("experts.method", recipe_with);
  expect_read<ReinitFrom>("experts.reinit_from", recipe_with);
  expect_read<ReinitSets>("experts.reinit_sets", recipe_with);
  expect_read<ReinitStats>("experts.reinit_stats", recipe_with);
  expect_read<SplitOrder>("experts.split", recipe_with);
  expect_read<SourcesRest>("sources.rest", recipe_with);
  expect_read<RouterMethod>("router.method", recipe_with);
  expect_complete<SharedMethod>();
  expect_read<SharedGate>("shared.gate", recipe_with);
}

TEST(Names, OfModels) {
  expect_complete<NormKind>();
  expect_complete<Activation>();
  expect_complete<QkNorm>();
  expect_complete<Trait>();
}

}  // namespace
}  // namespace upmoe
