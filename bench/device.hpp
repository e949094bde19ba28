// Where a case runs: memory, the op, and a clock. Failures are exceptions.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

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

  virtual fastattn::Status run(const fastattn::Attention& problem) const = 0;
  virtual fastattn::Status run(const fastattn::AttentionBackward& problem) const = 0;
  virtual std::size_t workspace(const fastattn::AttentionBackward& problem) const = 0;

  // Median time of one call in microseconds, with cold caches on the GPU; about `seconds` are spent on it.
  virtual double time_us(const std::function<void()>& call, double seconds) const = 0;
};

std::unique_ptr<Device> cpu_device();
std::unique_ptr<Device> cuda_device();  // throws where this build or this machine has no GPU for it

}  // namespace bench
