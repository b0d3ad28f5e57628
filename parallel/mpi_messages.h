#pragma once
// The non-blocking messages of one MPI verb. For mpi_comm.cpp alone: no other file of the project includes
// MPI.

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace upmoe {

// Throws Error(kCommunicator) in MPI's own words.
void check_mpi(int result, const char* call);

class MpiMessages {
 public:
  // chunk: bytes of the largest message; longer transfers are cut.
  MpiMessages(MPI_Comm comm, std::size_t chunk) : comm_(comm), chunk_(chunk) {}

  void send(const std::byte* data, std::size_t bytes, int to, int tag);
  void receive(std::byte* data, std::size_t bytes, int from, int tag);
  // Until all are through. Yields the processor between polls: ranks may outnumber cores. After a while tells
  // the watchdog which ranks `collective` (its number there) still waits for. Throws when a peer sent another
  // amount than was expected.
  void wait(std::uint64_t collective);

 private:
  struct Message {
    int peer;
    bool sent;
    int bytes;
  };

  MPI_Request& add(const Message& message);
  template <class F>
  void for_chunks(std::size_t bytes, const F& f) const;
  std::string whom_it_waits_for() const;
  int in_the_job(int rank) const;
  int own_rank() const;
  void report(const std::vector<MPI_Status>& statuses) const;
  void check_length(MPI_Status& status, const Message& message) const;

  MPI_Comm comm_;
  std::size_t chunk_;
  std::vector<MPI_Request> requests_;
  std::vector<Message> messages_;
};

}  // namespace upmoe
