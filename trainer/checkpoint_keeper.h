#pragma once
// Which checkpoints of a run stay on the disk, by what they are worth. For rank 0, which holds the run's lock.

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "data/manifest.h"
#include "trainer/checkpoint_choice.h"

namespace upmoe {

// Of usable checkpoints the newest `keep` stay. Never removed: milestones, of steps that `keep_every` divides; the
// two newest of those that this process read to the last byte (the one it went on from, those it wrote and read
// back); and whatever is not usable, which does not count either. Nothing is read at a save but manifests that are
// not known yet, and sizes.
class CheckpointKeeper {
 public:
  // `keep_every` 0: there are no milestones.
  CheckpointKeeper(std::filesystem::path checkpoints_dir, int keep, std::int64_t keep_every = 0);

  // At the start: removes what killed saves and removals left. Only warns when it cannot.
  void clear_leftovers() const;
  // What was found at the start: damaged ones are set aside, so that no later start reads them again; one
  // that only cannot be read stays, and is passed over from now on.
  void remember(const CheckpointChoice& choice);

  // Before a save of `step`: whatever has its name is set aside.
  void make_way(std::int64_t step);
  // Before a save of `bytes`: where the disk lacks room, what that save would push out goes first, as long as
  // two usable ones stay. `last`: the state would be lost with the run, so all but the newest good one may
  // go. Throws Error(kBadInput) that says what would help when there is not enough.
  void make_room(std::uint64_t bytes, bool last);
  // After a save that met a full disk unforeseen: the oldest of those that make_room could have taken. False
  // when there is none.
  bool retire_oldest(bool last);
  // After a save: known to be good from now on; older ones beyond `keep` go. Failing only warns. Nothing goes
  // when a power cut may still lose the new one.
  void wrote(std::int64_t step, bool durable);

 private:
  struct Known {
    std::vector<StoredFile> files;
    std::uint64_t overhead = 0;  // bytes on the disk beside the tensors' own
  };
  struct Usable {
    std::int64_t step = 0;
    std::filesystem::path folder;
  };
  bool is_usable(std::int64_t step, const std::filesystem::path& folder);
  std::vector<Usable> usable();  // oldest first
  bool is_milestone(const Usable& u) const { return keep_every_ > 0 && u.step % keep_every_ == 0; }
  std::vector<Usable> without_old_milestones(std::vector<Usable> all, std::size_t newest) const;
  bool is_one_of_last_good(std::int64_t step, std::size_t count) const;
  std::vector<Usable> that_may_go(bool last);  // oldest first
  std::string advice(std::uint64_t missing);
  void remove(const Usable& checkpoint);

  std::filesystem::path dir_;
  std::size_t keep_;
  std::int64_t keep_every_;
  std::vector<std::int64_t> good_;                   // in the order in which this process came to know them
  std::map<std::int64_t, std::string> passed_over_;  // with the reason
  std::map<std::int64_t, Known> known_;              // those whose manifest was read
};

}  // namespace upmoe
