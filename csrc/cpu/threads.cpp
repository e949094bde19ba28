#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "fastattn/fastattn.hpp"

namespace fastattn {

StdThreads::StdThreads(int count)
    : count_(count > 0 ? count : std::max(1, static_cast<int>(std::thread::hardware_concurrency()))) {}

// Workers take the next index as they become free, so that tasks started first may be the longest.
void StdThreads::run(std::int64_t count, Task task, void* context) const {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      task(context, i);
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (std::int64_t i = 1; i < std::min<std::int64_t>(count_, count); ++i) {
      helpers.emplace_back(work);
    }
  } catch (...) {  // the system gives no more threads: those that there are do the work
  }
  work();
  for (std::thread& helper : helpers) {
    helper.join();
  }
}

}  // namespace fastattn
