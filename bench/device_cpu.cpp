#include <chrono>
#include <cstring>
#include <fstream>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.hpp"
#include "statistics.hpp"

namespace bench {
namespace {

constexpr std::align_val_t kAlignment{256};

class CpuDevice final : public Device {
 public:
  Machine machine() const override {
    std::ifstream cpuinfo("/proc/cpuinfo");
    for (std::string line; std::getline(cpuinfo, line);) {
      if (line.starts_with("model name")) {
        return {.processor = line.substr(line.find(": ") + 2), .driver = "", .toolkit = ""};
      }
    }
    return {.processor = "unknown CPU", .driver = "", .toolkit = ""};
  }

  std::shared_ptr<void> allocate(std::size_t bytes) const override {
    return {::operator new(bytes, kAlignment), [](void* memory) { ::operator delete(memory, kAlignment); }};
  }
  void copy_in(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  void copy_out(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }

  double time_us(const std::function<void()>& call, double seconds) const override {
    using Clock = std::chrono::steady_clock;
    constexpr std::size_t kFewest = 5;
    call();
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    std::vector<double> times;
    while (times.size() < kFewest || Clock::now() < end) {
      const auto start = Clock::now();
      call();
      times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    return median(std::move(times));
  }
};

}  // namespace

std::unique_ptr<Device> cpu_device() { return std::make_unique<CpuDevice>(); }

#if !FASTATTN_WITH_CUDA
std::unique_ptr<Device> cuda_device() {
  throw std::runtime_error("--device cuda: this fastattn_bench was built without CUDA; allowed: cpu");
}
#endif

}  // namespace bench
