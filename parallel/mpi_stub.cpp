// Linked instead of mpi_comm.cpp where MPI is not built in.

#include "parallel/mpi_comm.h"

#include <unistd.h>

namespace upmoe {

namespace {
[[noreturn]] void no_mpi() {
  fail(ExitCode::kUsage,
       "a launcher started several ranks, but this program was built without MPI (UPMOE_MPI=OFF)");
}
}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(std::size_t) {
  no_mpi();
}
MpiWorld start_mpi(int*, char***) {
  no_mpi();
}
void stop_mpi() {}
std::string mpi_library() {
  return "this program was built without it";
}
void abort_mpi(int code) {
  _exit(code);
}

}  // namespace upmoe
