#include "kernels/core/log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <mutex>

namespace upmoe::log {

namespace {

std::shared_ptr<spdlog::logger> make_logger(int rank, int ranks, const std::filesystem::path& folder) {
  auto console = std::make_shared<spdlog::sinks::stderr_color_sink_mt>();
  console->set_level(rank == 0 ? spdlog::level::info : spdlog::level::warn);
  console->set_pattern(ranks > 1 ? fmt::format("%^%v%$ [rank {}]", rank) : "%^%v%$");
  if (rank == 0) console->set_pattern("%^%v%$");
  auto logger = std::make_shared<spdlog::logger>("upmoe", console);
  if (!folder.empty()) {
    auto file = std::make_shared<spdlog::sinks::basic_file_sink_mt>(
        (folder / fmt::format("rank_{}.log", rank)).string());
    file->set_pattern("%Y-%m-%d %H:%M:%S.%e %l %v");
    logger->sinks().push_back(file);
    logger->flush_on(spdlog::level::info);
  }
  return logger;
}

// Ranks that are threads of one process share one logger; rank 0's setting stands.
std::mutex mutex;
std::shared_ptr<spdlog::logger>& logger() {
  static std::shared_ptr<spdlog::logger> instance = make_logger(0, 1, {});
  return instance;
}

}  // namespace

void start(int rank, int ranks, const std::filesystem::path& folder) {
  const std::lock_guard lock(mutex);
  logger() = make_logger(rank, ranks, folder);
}

void write(Level level, const std::string& line) {
  std::shared_ptr<spdlog::logger> now;
  {
    const std::lock_guard lock(mutex);
    now = logger();
  }
  now->log(level == Level::kInfo ? spdlog::level::info : spdlog::level::warn, line);
}

}  // namespace upmoe::log
