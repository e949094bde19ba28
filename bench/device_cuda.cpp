// The GPU through the CUDA runtime. Compiled only into a build with CUDA.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.hpp"
#include "statistics.hpp"

namespace bench {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  double us_since(const Event& earlier) const {
    float milliseconds = 0.f;
    check(cudaEventSynchronize(event_), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&milliseconds, earlier.event_, event_), "cudaEventElapsedTime");
    return 1e3 * milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaDevice final : public Device {
 public:
  CudaDevice() {
    check(cudaGetDeviceProperties(&properties_, 0), "--device cuda");
    check(cudaStreamCreate(&stream_), "cudaStreamCreate");
    executor_ = fastattn::Stream{stream_};
    cache_eraser_bytes_ = 2 * static_cast<std::size_t>(properties_.l2CacheSize);
    cache_eraser_ = allocate(cache_eraser_bytes_);
  }
  ~CudaDevice() override { cudaStreamDestroy(stream_); }

  Machine machine() const override {
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    return {.processor = properties_.name, .driver = dotted(driver), .toolkit = dotted(runtime)};
  }

  std::shared_ptr<void> allocate(std::size_t bytes) const override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return {memory, [](void* p) { cudaFree(p); }};
  }
  void copy_in(void* to, const void* from, std::size_t bytes) const override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
  }
  void copy_out(void* to, const void* from, std::size_t bytes) const override {
    check(cudaStreamSynchronize(stream_), "op");
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
  }

  double time_us(const std::function<void()>& call, double seconds) const override {
    constexpr int kWarmUps = 3, kEstimates = 5;
    for (int i = 0; i < kWarmUps; ++i) {
      call();
    }
    const double estimate = median(times_us(call, kEstimates));
    const int repeats = std::clamp(static_cast<int>(1e6 * seconds / estimate), 10, 1000);
    return median(times_us(call, repeats));
  }

 private:
  // Everything is enqueued before anything is waited for, so the launch of a call overlaps the erasing before it.
  std::vector<double> times_us(const std::function<void()>& call, int repeats) const {
    std::vector<std::pair<Event, Event>> events(static_cast<std::size_t>(repeats));
    for (auto& [start, stop] : events) {
      check(cudaMemsetAsync(cache_eraser_.get(), 0, cache_eraser_bytes_, stream_), "cudaMemsetAsync");
      start.record(stream_);
      call();
      stop.record(stream_);
    }
    std::vector<double> times;
    for (auto& [start, stop] : events) {
      times.push_back(stop.us_since(start));
    }
    return times;
  }

  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  std::shared_ptr<void> cache_eraser_;
  std::size_t cache_eraser_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Device> cuda_device() { return std::make_unique<CudaDevice>(); }

}  // namespace bench
