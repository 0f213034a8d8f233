// Whether sharing a region among the threads of torch's pool pays at the moment.
//
// The pool's threads wait for each other at the end of a region. Where other programs use the processors, one of them, the caller
// included, may wait for its turn: 8 to 16 ms beside one busy process on two processors, in regions of 0.1 ms that the caller
// alone would have done in 0.2. No way of sharing out the work helps, since the pool waits also for threads that have nothing to
// do. So after a region that took longer than its caller would have needed alone, the caller works alone for a while, a fixed multiple
// of the time that was lost: of many tries at most 1 / kPause of the time can be lost again.
#pragma once
#include <atomic>
#include <cstdint>

namespace calora {

class Forks {  // times in ns; any number of threads may call
 public:
  bool pay(int64_t now) const { return now >= until_.load(std::memory_order_relaxed); }

  // Whether to measure how long the caller is on a processor, 1 to 2 us: where the last region took so long that time may be lost.
  bool watch() const { return slow_.load(std::memory_order_relaxed); }

  // A region of `threads` that took `wall` until `now`; its caller's share took `worked` on a processor, -1 if that was not measured.
  void ended(int64_t now, int64_t threads, int64_t wall, int64_t worked) {
    if (watch() != (wall >= kNoise)) slow_.store(wall >= kNoise, std::memory_order_relaxed);
    const int64_t lost = worked < 0 ? 0 : wall - threads * worked;  // against the caller doing all of it, undisturbed
    if (lost < kNoise) return;
    until_.store(now + (lost < kLongest / kPause ? lost * kPause : kLongest), std::memory_order_relaxed);
  }

  static constexpr int64_t kNoise = 500'000, kPause = 20, kLongest = 1'000'000'000;

 private:
  std::atomic<int64_t> until_{0};
  std::atomic<bool> slow_{false};
};

}  // namespace calora
