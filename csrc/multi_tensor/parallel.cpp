#include "parallel.h"

#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "tuning.h"

namespace fusedopt {

namespace {

using std::chrono::nanoseconds;

// libgomp's pool does not survive fork(): a parallel region in the child would wait for threads
// that only its parent has.
const pid_t kImportedBy = getpid();

// Where more threads than cores want to run, the wait for them is longer than their work. Then all
// work is done alone until this time: at first for as long as was lost, and for longer each time that
// time is lost again. Of all threads that step: they want the same cores.
std::atomic<std::int64_t> alone_until{0};
std::atomic<int> patience{1};

bool read_always() {
  const char* wanted = std::getenv("FUSEDOPT_CPU_THREADS");
  if (wanted == nullptr || *wanted == '\0') return false;
  if (std::string(wanted) == "always") return true;
  throw std::invalid_argument("FUSEDOPT_CPU_THREADS=" + std::string(wanted) +
                              ": it can only be always");
}

nanoseconds now_on(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return std::chrono::seconds(now.tv_sec) + nanoseconds(now.tv_nsec);
}

}  // namespace

bool shares_always() {
  static const bool always = read_always();
  return always;
}

bool is_worth_sharing(std::int64_t num_elements) {
  return num_elements >= kSerialElements && getpid() == kImportedBy &&
         (shares_always() ||
          now_on(CLOCK_MONOTONIC).count() >= alone_until.load(std::memory_order_relaxed));
}

SharedWork::SharedWork() : wall_(now_on(CLOCK_MONOTONIC)), cpu_(now_on(CLOCK_THREAD_CPUTIME_ID)) {}

void SharedWork::own_part_done() { own_ = now_on(CLOCK_THREAD_CPUTIME_ID) - cpu_; }

void SharedWork::all_done(int num_threads) const {
  const nanoseconds now = now_on(CLOCK_MONOTONIC);
  const nanoseconds lost = now - wall_ - num_threads * own_;
  const int times = patience.load(std::memory_order_relaxed);
  if (lost.count() > 0) {
    alone_until.store((now + times * lost).count(), std::memory_order_relaxed);
    patience.store(std::min(2 * times, kMaxPatience), std::memory_order_relaxed);
  } else if (times > 1) {
    patience.store(times / 2, std::memory_order_relaxed);
  }
}

}  // namespace fusedopt
