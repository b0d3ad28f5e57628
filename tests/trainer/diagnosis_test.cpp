// What doctor and a run say of their machine: read from planted files, judged by planted facts, and tried on a real
// folder; and what is measured comes back through the reader of machines.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"
#include "tests/support/temporary_directory.h"
#include "trainer/diagnosis/findings.h"
#include "trainer/diagnosis/libraries.h"
#include "trainer/diagnosis/machine_facts.h"
#include "trainer/diagnosis/machine_rates.h"
#include "trainer/diagnosis/warnings.h"
#include "trainer/one_program.h"

namespace upmoe {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
namespace fs = std::filesystem;

class PlantedHost : public testing::Test {
 protected:
  void write(const std::string& path, const std::string& text) {
    fs::create_directories((dir_.path() / path).parent_path());
    std::ofstream(dir_.path() / path) << text;
  }
  HostFacts read() const { return read_host(dir_.path()); }
  test::TemporaryDirectory dir_;
};

TEST_F(PlantedHost, IsReadFromTheKernelsFiles) {
  write("proc/cpuinfo",
        "processor\t: 0\nmodel name\t: A Processor @ 2 GHz\nprocessor\t: 1\nmodel name\t: Another\n");
  write("proc/self/status",
        "Name:\tupmoe\nVmRSS:\t    2048 kB\nCpus_allowed:\tf\nCpus_allowed_list:\t0-3,8\n");
  write("proc/self/cgroup", "0::/job\n");
  write("sys/fs/cgroup/job/cpu.max", "150000 100000\n");
  write("sys/fs/cgroup/job/memory.max", "1000000\n");
  write("sys/fs/cgroup/job/memory.current", "400000\n");
  write("proc/meminfo", "MemTotal:       4000 kB\nMemAvailable:       3000 kB\n");
  write("proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max locked memory         8388608              unlimited            bytes\n"
        "Max open files            1024                 1048576              files\n");
  write("proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Sat Nov 8\nGCC version: 12.2.0\n");
  write("proc/driver/nvidia/gpus/0000:01:00.0/information", "");
  write("proc/driver/nvidia/gpus/0000:02:00.0/information", "");
  write("sys/class/infiniband/mlx5_0/x", "");
  const HostFacts f = read();
  EXPECT_EQ(f.processor, "A Processor @ 2 GHz");
  EXPECT_EQ(f.allowed, "0-3,8");
  EXPECT_EQ(f.resident, 2048 * 1024.0);
  EXPECT_EQ(f.quota, 1.5);
  EXPECT_EQ(f.memory, 4000 * 1024.0);
  EXPECT_EQ(f.memory_left, 600000);
  EXPECT_EQ(f.open_files.soft, 1024u);
  EXPECT_EQ(f.open_files.hard, 1048576u);
  EXPECT_EQ(f.locked_memory.soft, 8388608u);
  EXPECT_EQ(f.locked_memory.hard, kUnlimited);
  EXPECT_FALSE(f.shared_memory_left);
  EXPECT_EQ(f.gpu_driver, "580.82.07");
  EXPECT_EQ(f.gpus, 2);
  EXPECT_EQ(f.rdma_adapters, 1);
  fs::create_directories(dir_.path() / "dev/shm");
  EXPECT_TRUE(read().shared_memory_left);
}

TEST_F(PlantedHost, SaysNothingWhereThereIsNothing) {
  const HostFacts f = read();
  EXPECT_EQ(f.processor, "");
  EXPECT_EQ(f.open_files.soft, kUnlimited);
  EXPECT_EQ(f.memory_left, 0);
  EXPECT_THAT(findings_of(f, {}), IsEmpty());
}

TEST(Host, IsThisOne) {
  const HostFacts f = read_host();
  EXPECT_GT(f.memory, 1e8);
  EXPECT_GE(f.memory, f.memory_left);
  EXPECT_GT(f.resident, 1e6);
  EXPECT_FALSE(f.allowed.empty());
}

// A host that nothing is wrong with.
HostFacts good() {
  HostFacts f;
  f.memory_left = 1e12;
  f.shared_memory_left = 1e10;
  return f;
}

void expect_one(const std::vector<Finding>& found, Severity severity, ExitCode code,
                const testing::Matcher<std::string>& words) {
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].severity, severity);
  EXPECT_EQ(found[0].code, code);
  EXPECT_THAT(found[0].words, words);
  EXPECT_EQ(found[0].words.find('\n'), std::string::npos) << "one line";
}

TEST(Findings, OfOpenFiles) {
  HostFacts f = good();
  f.open_files = {1024, 1048576};
  EXPECT_THAT(findings_of(f, {}), IsEmpty());
  f.open_files.soft = 100;
  expect_one(findings_of(f, {}), Severity::kWarning, ExitCode::kDone,
             AllOf(HasSubstr("100 files open"), HasSubstr("ulimit -n 256")));
  // More ranks need more: a connection or two to each.
  expect_one(findings_of(f, {.ranks = 64}), Severity::kFailure, ExitCode::kBadInput,
             AllOf(HasSubstr("a rank of 64 needs 174"), HasSubstr("ulimit -n 382")));
  f.open_files = {20, 20};
  expect_one(findings_of(f, {}), Severity::kFailure, ExitCode::kBadInput,
             AllOf(HasSubstr("20 files open"), HasSubstr("hard limit is 20"), HasSubstr("limits.conf")));
}

TEST(Findings, OfSharedMemory) {
  HostFacts f = good();
  f.shared_memory_left = 8.0 * 1024 * 1024;
  EXPECT_THAT(findings_of(f, {}), IsEmpty()) << "one rank has nobody to send to";
  expect_one(findings_of(f, {.ranks = 2, .ranks_here = 2}), Severity::kWarning, ExitCode::kDone,
             AllOf(HasSubstr("/dev/shm has 8 MiB left"), HasSubstr("--shm-size")));
  f.shared_memory_left.reset();
  expect_one(findings_of(f, {.ranks = 2, .ranks_here = 2}), Severity::kWarning, ExitCode::kDone,
             HasSubstr("there is no /dev/shm"));
}

TEST(Findings, OfLockedMemoryWhereAnAdapterWantsIt) {
  HostFacts f = good();
  f.locked_memory = {8u << 20, kUnlimited};
  EXPECT_THAT(findings_of(f, {.hosts = 2}), IsEmpty());
  f.rdma_adapters = 1;
  EXPECT_THAT(findings_of(f, {}), IsEmpty());
  expect_one(findings_of(f, {.hosts = 2}), Severity::kWarning, ExitCode::kDone,
             AllOf(HasSubstr("lock 8 MiB"), HasSubstr("ulimit -l unlimited")));
}

TEST(Findings, OfGpusAndMemory) {
  HostFacts f = good();
  f.gpus = 2;
  EXPECT_THAT(findings_of(f, {.gpus = 2}), IsEmpty());
  expect_one(findings_of(f, {}), Severity::kWarning, ExitCode::kDone,
             HasSubstr("2 GPUs that this program cannot use"));
  expect_one(findings_of(f, {.gpus = 1}), Severity::kNote, ExitCode::kDone, HasSubstr("1 of the 2 GPUs"));
  f = good();
  f.memory_left = 1e8;
  expect_one(findings_of(f, {}), Severity::kNote, ExitCode::kDone, HasSubstr("0.09 GiB of memory left"));
}

TEST(Findings, OfFolders) {
  FolderFacts f{.asked = "/runs/x", .existing = "/runs", .kind = "ext4", .free_bytes = 1e12};
  EXPECT_THAT(findings_of(f), IsEmpty());
  f.kind = "tmpfs";
  expect_one(findings_of(f), Severity::kWarning, ExitCode::kDone,
             AllOf(HasSubstr("/runs/x is in memory"), HasSubstr("on a disk")));
  f.kind = "overlay";
  expect_one(findings_of(f), Severity::kNote, ExitCode::kDone, HasSubstr("container's own layer"));
  f.kind = "xfs";
  f.free_bytes = 1e8;
  expect_one(findings_of(f), Severity::kNote, ExitCode::kDone, HasSubstr("0.09 GiB free"));
  f.free_bytes = 1e12;
  FolderTrial trial{.has_locks = true};
  EXPECT_THAT(findings_of(f, trial), IsEmpty());
  trial.sync_s = 3;
  expect_one(findings_of(f, trial), Severity::kWarning, ExitCode::kDone, HasSubstr("takes 3.0 s"));
  expect_one(findings_of(f, FolderTrial{}), Severity::kWarning, ExitCode::kDone, HasSubstr("knows no locks"));
}

TEST(Folder, TheNearestMountSaysTheKind) {
  const std::string mounts =
      "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
      "30 22 0:25 / /shared rw - nfs4 server:/x rw\n"
      "31 30 0:26 / /shared/a\\040b rw master:3 - tmpfs tmpfs rw\n"
      "33 22 0:28 / /twice rw - ext4 /dev/vdb rw\n"
      "34 33 0:29 / /twice rw - xfs /dev/vdc rw\n"
      "a line of another form\n";
  EXPECT_EQ(kind_of_file_system("/home/x", mounts), "ext4");
  EXPECT_EQ(kind_of_file_system("/shared", mounts), "nfs4");
  EXPECT_EQ(kind_of_file_system("/sharedish", mounts), "ext4");
  EXPECT_EQ(kind_of_file_system("/shared/a b/c", mounts), "tmpfs");
  EXPECT_EQ(kind_of_file_system("/twice/x", mounts), "xfs");
  EXPECT_EQ(kind_of_file_system("/x", ""), "");
}

TEST(Folder, IsTriedAndLeftAsItWas) {
  const test::TemporaryDirectory dir;
  const FolderFacts facts = read_folder(dir.path() / "not" / "there", read_mounts());
  EXPECT_EQ(facts.existing, dir.path());
  EXPECT_GT(facts.free_bytes, 0);
  EXPECT_FALSE(facts.kind.empty());
  const FolderTrial trial = try_folder(facts.existing, 1 << 20, 3);
  EXPECT_GT(trial.write_bytes_per_s, 0);
  EXPECT_GT(trial.sync_s, 0);
  EXPECT_GT(trial.rename_s, 0);
  EXPECT_TRUE(fs::is_empty(dir.path()));
}

TEST(Folder, ThatCannotBeWrittenToIsAnErrorInTheSystemsWords) {
  try {
    try_folder("/proc", 1 << 20, 0);
    FAIL() << "wrote to /proc";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_THAT(e.what(), HasSubstr("/proc/.upmoe-doctor"));
  }
}

TEST(Libraries, SayTheirVersions) {
  for (const auto& [name, version] : library_versions()) EXPECT_FALSE(version.empty()) << name;
}

TEST(Surroundings, OfThreadsAreOneHost) {
  run_in_threads(3, [](Communicator& world) {
    const Surroundings where = surroundings_of(world);
    EXPECT_EQ(where.ranks, 3);
    EXPECT_EQ(where.ranks_here, 3);
    EXPECT_EQ(where.hosts, 1);
  });
}

TEST(Programs, OfRanksOfOneProcessAreOne) {
  run_in_threads(3, [](Communicator& world) { EXPECT_EQ(require_one_program(world).size(), 8u); });
}

TEST(MachineFacts, OfCores) {
  HostFacts host;
  host.memory = 123456.7e6;
  host.resident = 98765.4e3;
  Machine m;
  add_facts(m, {.gpu = {}, .cores = 6}, host, {.ranks = 2, .ranks_here = 2});
  EXPECT_EQ(m.name, "a processor, 6 cores");
  EXPECT_EQ(m.memory_gb, 123.5);
  EXPECT_EQ(m.ranks_per_node, 6);
  EXPECT_EQ(m.overhead_gb, 0.09877);
  host.processor = "A Processor";
  add_facts(m, {.gpu = {}, .cores = 6}, host, {});
  EXPECT_EQ(m.name, "A Processor, 6 cores");
}

// The host's memory says nothing of a GPU's, and a rank may be shown less than its node has.
TEST(MachineFacts, OfGpus) {
  HostFacts host;
  host.memory = 1e12;
  host.resident = 2e9;
  const MeasuredDevice device{.gpu = "A GPU", .gpu_bytes = 84.94e9, .cores = 16};
  const auto ranks_of_node = [&](const Surroundings& where) {
    Machine m;
    add_facts(m, device, host, where);
    EXPECT_EQ(m.name, "A GPU");
    EXPECT_EQ(m.memory_gb, 84.94);
    EXPECT_EQ(m.overhead_gb, 0);
    EXPECT_EQ(to_yaml(m).find("overhead_gb"), std::string::npos);
    return m.ranks_per_node;
  };
  EXPECT_EQ(ranks_of_node({.gpus = 4}), 4);
  EXPECT_EQ(ranks_of_node({.ranks = 16, .ranks_here = 8, .hosts = 2, .gpus = 1}), 8) << "each shown its own";
  host.gpus = 8;
  EXPECT_EQ(ranks_of_node({.gpus = 1}), 8) << "one of the node's is shown";
}

Effort little() {
  Effort effort;
  effort.edges_on_cpu = {32, 64};
  effort.bursts = {.count = 1, .seconds = 0};
  effort.copied_elements = 4096;
  effort.sent_bytes = {4096, 65536};
  effort.disk_bytes = 1 << 20;
  return effort;
}

// Every other run takes three times as long: a step has both.
TEST(Measured, TheUsualRunIsBetweenTheFastestAndTheSlowest) {
  using std::chrono::milliseconds;
  int runs = 0;
  Exec ex;
  const RunTimes found = times_of(ex, {.count = 2, .seconds = 0.04}, [&] {
    std::this_thread::sleep_for(milliseconds(runs++ % 2 == 0 ? 12 : 4));
  });
  EXPECT_GE(runs, 4) << "one that does not count, one, and of each burst at least one";
  EXPECT_GE(found.fastest, 0.004);
  EXPECT_GE(found.usual, (found.fastest * (runs / 2) + 0.012 * (runs / 2 - 1)) / (runs - 1) * 0.999);
}

// What was measured, written and read back.
void expect_readable(Machine m, const fs::path& folder) {
  m.name = "this: \"one\"";
  m.source = m.rates.source = "a test";
  m.memory_gb = 1;
  const fs::path file = folder / "m.yaml";
  std::ofstream(file) << to_yaml(m);
  const Machine read = read_machine(file);
  EXPECT_EQ(read.name, m.name);
  EXPECT_EQ(read.rates.gemm_bf16, m.rates.gemm_bf16);
  EXPECT_EQ(read.rates.grouped_fp32, m.rates.grouped_fp32);
  EXPECT_EQ(read.inside_node.gb_per_s, m.inside_node.gb_per_s);
  EXPECT_EQ(read.disk_gb_per_s, m.disk_gb_per_s);
  EXPECT_EQ(to_yaml(read), to_yaml(m));
}

TEST(Measured, OfOneRank) {
  const test::TemporaryDirectory dir;
  const std::unique_ptr<Communicator> world = make_self_communicator();
  std::vector<std::string> told;
  const MeasuredMachine found = measure_machine(*world, {}, dir.path(), little(),
                                                [&](const std::string& what) { told.push_back(what); });
  EXPECT_THAT(told, ElementsAre("products", "products of experts", "attention", "memory", "peaks", "disk"));
  const Machine& m = found.machine;
  EXPECT_THAT(found.transfers, IsEmpty());
  EXPECT_EQ(m.inside_node.gb_per_s, 0);
  EXPECT_EQ(m.rates.skew, 0) << "nobody to wait for";
  EXPECT_TRUE(m.shared_by_ranks);
  EXPECT_THAT(m.rates.edges, ElementsAre(32, 64));
  for (const std::vector<double>* rates :
       {&m.rates.gemm_bf16, &m.rates.gemm_fp32, &m.rates.grouped_bf16, &m.rates.grouped_fp32})
    EXPECT_THAT(*rates, ElementsAre(testing::Gt(0), testing::Gt(0)));
  for (const double number :
       {m.rates.attention_forward_bf16, m.rates.attention_backward_fp32, m.rates.copy_gb_per_s, m.rates.op_us,
        m.disk_gb_per_s, m.bf16_tflops, m.fp32_tflops, m.memory_gb_per_s})
    EXPECT_GT(number, 0);
  EXPECT_GE(m.fp32_tflops, m.rates.gemm_fp32.back());
  EXPECT_GE(m.memory_gb_per_s, m.rates.copy_gb_per_s);
  expect_readable(m, dir.path());
  fs::remove(dir.path() / "m.yaml");
  EXPECT_TRUE(fs::is_empty(dir.path()));
}

TEST(Measured, OfRanksWithTheirLinks) {
  const test::TemporaryDirectory dir;
  run_in_threads(2, [&](Communicator& world) {
    const MeasuredMachine found = measure_machine(world, {}, dir.path(), little(), [](const std::string&) {});
    EXPECT_EQ(found.transfers.size(), 4u);  // two sizes of two verbs
    for (const TransferTime& t : found.transfers) {
      EXPECT_EQ(t.link, "inside a host");
      EXPECT_GT(t.bytes_per_s, 0);
    }
    EXPECT_GT(found.machine.inside_node.gb_per_s, 0);
    EXPECT_GT(found.machine.inside_node.latency_us, 0);
    EXPECT_EQ(found.machine.between_nodes.gb_per_s, 0);
    EXPECT_GT(found.machine.rates.skew, 0) << "no two ranks take as long to the nanosecond, round by round";
    // Rates are of all ranks together: one that were a rank's own would differ from the others'.
    const Machine::Rates& r = found.machine.rates;
    for (const std::vector<double>& of : {r.gemm_bf16, r.gemm_fp32, r.grouped_bf16, r.grouped_fp32,
                                          std::vector{r.attention_forward_fp32, r.attention_backward_bf16,
                                                      r.copy_gb_per_s, r.op_us, r.skew}}) {
      std::vector<double> largest = of;
      world.all_reduce(host_view(largest.data(), {static_cast<std::int64_t>(largest.size())}),
                       ReduceOp::kMax);
      EXPECT_EQ(of, largest);
    }
    if (world.rank() == 0) expect_readable(found.machine, dir.path());
  });
}

TEST(Measured, FourDigits) {
  EXPECT_EQ(four_digits(0.123456), 0.1235);
  EXPECT_EQ(four_digits(98764), 98760);
}

}  // namespace
}  // namespace upmoe
