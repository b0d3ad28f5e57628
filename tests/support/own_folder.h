#pragma once
// Ranks as threads that see other files under one name, as ranks on hosts with disks of their own do.

#include <gtest/gtest.h>
#include <sched.h>

#include <filesystem>
#include <thread>

namespace upmoe::test {

// Some containers forbid it.
inline bool may_work_in_own_folder() {
  bool may = false;
  std::thread([&] { may = unshare(CLONE_FS) == 0; }).join();
  return may;
}

// The working directory of the calling thread, and of those that it starts, and of no other one.
inline void work_in(const std::filesystem::path& folder) {
  ASSERT_EQ(unshare(CLONE_FS), 0);
  std::filesystem::current_path(folder);
}

}  // namespace upmoe::test
