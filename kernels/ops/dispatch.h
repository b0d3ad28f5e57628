#pragma once
// The one switch from a checked op entry to a backend.

#include <span>
#include <utility>

#include "kernels/core/exec.h"
#include "kernels/ops/expert_rows.h"

namespace upmoe::ops {

inline void show(OpWatcher& w, const TensorView& t) {
  w.writes(t);
}
inline void show(OpWatcher& w, const ConstTensorView& t) {
  w.reads(t);
}
inline void show(OpWatcher& w, const TensorView* t) {
  if (t != nullptr) w.writes(*t);
}
inline void show(OpWatcher& w, const ConstTensorView* t) {
  if (t != nullptr) w.reads(*t);
}
inline void show(OpWatcher& w, const std::span<const ConstTensorView>& parts) {
  for (const ConstTensorView& t : parts) w.reads(t);
}
inline void show(OpWatcher& w, const ExpertRows& rows) {
  w.reads(rows.offset_e1);
}
template <class T>
void show(OpWatcher&, const T&) {}  // no tensor

template <class Cpu, class Cuda, class... Args>
void dispatch(Exec& ex, Cpu cpu, Cuda cuda, Args&&... args) {
  if (ex.watcher != nullptr) [[unlikely]]
    (show(*ex.watcher, args), ...);
  switch (ex.device.type) {
    case DeviceType::kCpu:
      if (ex.stream != nullptr) ex.stream->poll();
      return cpu(ex, std::forward<Args>(args)...);
    case DeviceType::kCuda:
      return cuda(ex, std::forward<Args>(args)...);
    case DeviceType::kDry:
      return;  // checked and booked, not computed
  }
}

}  // namespace upmoe::ops
