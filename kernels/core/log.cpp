#include "kernels/core/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <ctime>
#include <memory>
#include <mutex>
#include <set>

namespace upmoe::log {

namespace {

// Somebody who watches a terminal has a clock; who reads a file later has not.
bool lines_need_time() {
  return isatty(STDERR_FILENO) != 1;
}

std::shared_ptr<spdlog::logger> make_logger(int rank) {
  auto console = std::make_shared<spdlog::sinks::stderr_color_sink_mt>();
  console->set_level(rank == 0 ? spdlog::level::info : spdlog::level::warn);
  const std::string who = rank > 0 ? fmt::format(" [rank {}]", rank) : "";
  console->set_pattern((lines_need_time() ? "%Y-%m-%dT%H:%M:%S%z %v" : "%^%v%$") + who);
  return std::make_shared<spdlog::logger>("upmoe", console);
}

// Ranks that are threads of one process share one logger; rank 0's setting stands.
std::mutex mutex;
std::shared_ptr<spdlog::logger>& logger() {
  static std::shared_ptr<spdlog::logger> instance = make_logger(0);
  return instance;
}

}  // namespace

void start(int rank) {
  const std::lock_guard lock(mutex);
  logger() = make_logger(rank);
}

void write(Level level, const std::string& line) {
  std::shared_ptr<spdlog::logger> now;
  {
    const std::lock_guard lock(mutex);
    now = logger();
  }
  now->log(level == Level::kInfo ? spdlog::level::info : spdlog::level::warn, line);
}

void write_once(Level level, const std::string& line) {
  static std::set<std::string> written;
  {
    const std::lock_guard lock(mutex);
    if (!written.insert(line).second) return;
  }
  write(level, line);
}

std::string timestamp() {
  if (!lines_need_time()) return "";
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char moment[40] = {}, zone[8] = {};
  std::strftime(moment, sizeof moment, "%Y-%m-%dT%H:%M:%S", &local);
  std::strftime(zone, sizeof zone, "%z", &local);  // +hhmm; spdlog writes it with a colon
  return fmt::format("{}{:.3}:{} ", moment, zone, zone + 3);
}

}  // namespace upmoe::log
