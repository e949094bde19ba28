// Where a case runs: memory, an executor for the ops, and a clock. Failures are exceptions.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <variant>

#include "fastattn/fastattn.hpp"

namespace bench {

struct Machine {
  std::string processor, driver, toolkit;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual Machine machine() const = 0;

  virtual std::shared_ptr<void> allocate(std::size_t bytes) const = 0;  // 256-byte aligned
  virtual void copy_in(void* to, const void* from, std::size_t bytes) const = 0;
  virtual void copy_out(void* to, const void* from, std::size_t bytes) const = 0;

  // `call` with what an op takes last: the threads or the stream.
  template <class Call>
  auto run(const Call& call) const {
    return std::visit(call, executor_);
  }

  // Median time of one call in microseconds, with cold caches on the GPU; about `seconds` are spent on it.
  virtual double time_us(const std::function<void()>& call, double seconds) const = 0;

 protected:
  std::variant<fastattn::StdThreads, fastattn::Stream> executor_;  // threads, unless a device has a stream
};

std::unique_ptr<Device> cpu_device();
std::unique_ptr<Device> cuda_device();  // throws where this build or this machine has no GPU for it

}  // namespace bench
