#pragma once
// The MPI transport. Only runtime.cpp and the tests make one.

#include <memory>
#include <string>

#include "parallel/communicator.h"

namespace upmoe {

// A communicator over MPI_COMM_WORLD (a duplicate of its own). MPI must be initialised and not finalised
// before the communicator is gone. Messages longer than chunk_bytes travel in several (MPI counts are int).
std::unique_ptr<Communicator> make_mpi_communicator(std::size_t chunk_bytes = std::size_t{1} << 30);

struct MpiWorld {
  int rank = 0, size = 1;
};
MpiWorld start_mpi(int* argc, char*** argv);
void stop_mpi();
std::string mpi_library();  // name and version; before MPI has started too
[[noreturn]] void abort_mpi(int code);

}  // namespace upmoe
