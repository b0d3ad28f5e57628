#pragma once
// The non-blocking messages of one MPI verb. For mpi_comm.cpp alone.

#include <cstddef>
#include <cstdint>
#include <memory>

namespace upmoe {

// Throws Error(kCommunicator) in MPI's own words.
void check_mpi(int result, const char* call);

// Which host each rank of the job is on, for words about silent ones. Collective over the job, once.
void learn_hosts();

class MpiMessages {
 public:
  // mpi_comm: the address of an MPI_Comm, so that this header does without MPI's. chunk: bytes of the largest
  // message; longer transfers are cut.
  MpiMessages(const void* mpi_comm, std::size_t chunk);
  MpiMessages(MpiMessages&&) noexcept;
  ~MpiMessages();

  void send(const std::byte* data, std::size_t bytes, int to, int tag);
  void receive(std::byte* data, std::size_t bytes, int from, int tag);
  // Until all are through. Gives the processor away between polls, and after a moment sleeps between them:
  // the peers may need it. The watchdog watches it as `verb`, and after a while is told which ranks it still waits
  // for and what signs of life they gave. Throws when a peer sent another amount than was expected.
  void wait(const char* verb);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace upmoe
