#include "tests/support/fake_cuda/sm90_traffic.h"

#include <algorithm>
#include <cstdio>
#include <set>

#include "tests/support/fake_cuda/sm90_machine.h"

namespace sm90_twin {

namespace {

constexpr std::uintptr_t kBanks = 32, kWord = 4, kSector = 32;
constexpr unsigned kWavefront = kBanks * kWord;  // bytes

// Of lanes that are served together.
std::int64_t wavefronts(const Access* first, const Access* last) {
  std::array<std::set<std::uintptr_t>, kBanks> words;  // of each bank
  for (; first != last; ++first)
    for (std::uintptr_t at = first->address / kWord; at * kWord < first->address + first->bytes; ++at)
      words[at % kBanks].insert(at);
  std::size_t most = 0;
  for (const auto& of_bank : words) most = std::max(most, of_bank.size());
  return static_cast<std::int64_t>(most);
}

}  // namespace

Place::Place(Space space_, std::string_view what_, const std::source_location& site)
    : space(space_), what(what_), file(site.file_name()), line(site.line()) {
  file.remove_prefix(file.rfind('/') + 1);  // none where there is none
}

Demand& Demand::operator+=(const Demand& other) {
  bytes += other.bytes;
  taken += other.taken;
  least += other.least;
  return *this;
}

Demand shared_demand(const std::vector<Access>& lanes) {
  Demand demand;
  unsigned bytes = kWord;
  for (const Access& access : lanes) bytes = std::max(bytes, access.bytes);
  const std::size_t together = kWavefront / bytes;
  for (std::size_t begin = 0; begin < lanes.size(); begin += together) {
    const std::size_t end = std::min(begin + together, lanes.size());
    const std::int64_t taken = wavefronts(lanes.data() + begin, lanes.data() + end);
    demand.taken += taken;
    demand.least += taken > 0 ? 1 : 0;
  }
  for (const Access& access : lanes) demand.bytes += access.bytes;
  return demand;
}

Demand global_demand(const std::vector<Access>& lanes) {
  std::set<std::uintptr_t> sectors, words;
  for (const Access& access : lanes)
    for (std::uintptr_t at = access.address; at < access.address + access.bytes; at += kWord) {
      sectors.insert(at / kSector);
      words.insert(at / kWord);
    }
  const auto bytes = static_cast<std::int64_t>(words.size() * kWord);
  constexpr auto kBytes = static_cast<std::int64_t>(kSector);
  return {bytes, static_cast<std::int64_t>(sectors.size()), (bytes + kBytes - 1) / kBytes};
}

void Traffic::add(const Place& place, std::pair<unsigned, unsigned> block_and_warp, unsigned meetings,
                  unsigned lane, Access access) {
  Warp& warp = warps_[block_and_warp];
  if (warp.meetings != meetings) {
    close(warp);
    warp.meetings = meetings;
  }
  Instructions& here = warp.places[place];
  const std::size_t at = here.times[lane]++ - here.counted;
  if (here.open.size() <= at) here.open.resize(at + 1);
  Instruction& instruction = here.open[at];
  instruction.came |= 1u << lane;
  instruction.lanes[lane] = access;
  for (; !here.open.empty() && here.open.front().came == ~0u; here.open.pop_front(), ++here.counted)
    count(place, here.open.front());
}

void Traffic::count(const Place& place, const Instruction& instruction) {
  const std::vector<Access> lanes(instruction.lanes.begin(), instruction.lanes.end());
  demands_[place] += place.space == Space::kShared ? shared_demand(lanes) : global_demand(lanes);
}
void Traffic::close(Warp& warp) {
  for (const auto& [place, here] : warp.places)
    for (const Instruction& instruction : here.open) count(place, instruction);
  warp.places.clear();
}
void Traffic::end() {
  for (auto& [of, warp] : warps_) close(warp);
  warps_.clear();
}

Demand Traffic::sum(Space space) const {
  Demand sum;
  for (const auto& [place, demand] : demands_)
    if (place.space == space) sum += demand;
  return sum;
}

std::string Traffic::table(double tiles) const {
  std::string text;
  char line[200];
  const auto add = [&](Space space, const std::string& where, const Demand& d) {
    const auto of_tile = [tiles](std::int64_t n) { return static_cast<double>(n) / tiles; };
    std::snprintf(line, sizeof line, "  %-52s %10.1f kB %9.0f %s, least %9.0f\n", where.c_str(),
                  of_tile(d.bytes) / 1e3, of_tile(d.taken),
                  space == Space::kShared ? "wavefronts" : "sectors", of_tile(d.least));
    text += line;
  };
  for (const Space space : {Space::kShared, Space::kGlobal}) {
    for (const auto& [place, demand] : demands_)
      if (place.space == space)
        add(space,
            std::string(place.what) +
                (place.line == 0 ? "" : ", " + std::string(place.file) + ":" + std::to_string(place.line)),
            demand);
    add(space, space == Space::kShared ? "shared memory, all" : "global memory, all", sum(space));
  }
  return text;
}

void count_access(const Place& place, const void* p, unsigned bytes, bool active) {
  const Lane& lane = cluster().lane();
  const Block& block = *lane.block;
  auto address = reinterpret_cast<std::uintptr_t>(p);
  if (place.space == Space::kShared) address = block.place(p, bytes, "an access") + kLowestAddress;
  counted->add(place, {block.index, lane.index / 32}, block.warps[lane.index / 32].meeting.generation,
               lane.index % 32, {address, active ? bytes : 0});
}

}  // namespace sm90_twin
