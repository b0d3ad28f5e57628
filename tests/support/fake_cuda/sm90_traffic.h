#pragma once
// What a kernel asks of memory, counted by the model of the hardware: the wavefronts of shared memory, which serves
// each of its 32 banks once in one, and the sectors of 32 bytes of global memory; beside each the least that the same
// bytes could do with. Wavefronts above the least are conflicts of banks.
//
// The model's threads run one by one. Lanes of a warp are taken to be at the same instruction when they come from the
// same place in the sources, for the same time since their warp last met. A lane that a condition holds back from its
// last times in a loop therefore counts as it should, one that leaves out an earlier time does not.

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <source_location>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sm90_twin {

enum class Space { kShared, kGlobal };

struct Place {  // in the sources, or an engine's work, which has none
  Place(Space space_, std::string_view what_) : space(space_), what(what_) {}
  Place(Space space_, std::string_view what_, const std::source_location& site);
  Space space;
  std::string_view what;  // is done there
  std::string_view file;
  unsigned line = 0;
  auto operator<=>(const Place&) const = default;
};
struct Demand {  // of a place
  std::int64_t bytes = 0;
  std::int64_t taken = 0, least = 0;  // wavefronts, or sectors
  Demand& operator+=(const Demand& other);
};

struct Access {  // of one lane: `bytes` (4, 8 or 16) at `address`, or none
  std::uintptr_t address = 0;
  unsigned bytes = 0;
};
// Of one instruction, lane by lane. With 8 bytes each a warp is served by halves, with 16 by quarters.
Demand shared_demand(const std::vector<Access>& lanes);
Demand global_demand(const std::vector<Access>& lanes);

class Traffic {
 public:
  // A lane's part of an instruction of its warp, which has met `meetings` times.
  void add(const Place& place, std::pair<unsigned, unsigned> block_and_warp, unsigned meetings, unsigned lane,
           Access access);
  // An instruction whole, or an engine's work.
  void add(const Place& place, const Demand& demand) { demands_[place] += demand; }
  void end();  // of a launch: what came of an instruction is all of it

  const std::map<Place, Demand>& demands() const { return demands_; }
  Demand sum(Space space) const;
  std::string table(double tiles) const;  // a line for each place, of one tile

 private:
  struct Instruction {
    std::uint32_t came = 0;
    std::array<Access, 32> lanes{};
  };
  struct Instructions {  // of a warp at a place since it last met
    std::array<std::size_t, 32> times{};
    std::size_t counted = 0;
    std::deque<Instruction> open;
  };
  struct Warp {
    unsigned meetings = 0;
    std::map<Place, Instructions> places;
  };
  void count(const Place& place, const Instruction& instruction);
  void close(Warp& warp);

  std::map<std::pair<unsigned, unsigned>, Warp> warps_;
  std::map<Place, Demand> demands_;
};

// Of the launch that this operating-system thread runs; null where nobody counts.
inline constinit thread_local Traffic* counted = nullptr;

// By the thread that runs.
void count_access(const Place& place, const void* p, unsigned bytes, bool active = true);
// A matrix of 8 rows of 16 bytes, as stmatrix, ldmatrix and products have them; at(i): a row's place in shared memory.
template <class At>
void count_matrix(const Place& place, const At& at) {
  std::vector<Access> rows;
  for (int i = 0; i < 8; ++i) rows.push_back({at(i), 16});
  counted->add(place, shared_demand(rows));
}

}  // namespace sm90_twin
