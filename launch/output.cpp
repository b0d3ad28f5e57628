#include "launch/output.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "kernels/core/check.h"

namespace upmoe {

void hold_standard_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (fcntl(stream, F_GETFD) < 0 && errno == EBADF) {
      // The lowest free number, and those below are open by now.
      if (open("/dev/null", stream == STDIN_FILENO ? O_RDONLY : O_WRONLY) < 0) _exit(1);
    }
}

void print_result(std::string_view text) {
  errno = 0;
  const bool written =
      std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  if (!written && errno != EPIPE)
    fail(ExitCode::kBadInput, "standard output cannot be written: {}", std::strerror(errno));
}

}  // namespace upmoe
