// neighborhood_attention on the CPU: checks, then the kernels of the best instruction set this machine has.
#include "cpu/kernels.hpp"
#include "fastattn/fastattn.hpp"
#include "validate.hpp"

namespace fastattn {

namespace {

const cpu::NeighborhoodAttentionKernels* kernels() {
  return cpu::best_of(cpu::kNeighborhoodAttentionAvx2, cpu::kNeighborhoodAttentionAvx512);
}

template <int kNumAxes>
cpu::CpuNeighborhood<kNumAxes> schedule_of(const NeighborhoodAttention& problem) {
  const cpu::CpuNeighborhood<kNumAxes> boxes{};
  return make_neighborhood(problem.axes, boxes.q_tiling.box, boxes.k_tiling.box);
}

// Calls run(kernels, schedule) with those for the problem's number of axes.
template <class Run>
void with_schedule(const NeighborhoodAttention& problem, Run&& run) {
  switch (num_axes(problem.axes)) {
    case 1:
      return run(kernels()->one_axis, schedule_of<1>(problem));
    case 2:
      return run(kernels()->two_axes, schedule_of<2>(problem));
    case 3:
      return run(kernels()->three_axes, schedule_of<3>(problem));
  }
}

}  // namespace

Status neighborhood_attention(const NeighborhoodAttention& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || num_rows(problem) == 0) {
    return status;
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("neighborhood_attention");
  }
  with_schedule(problem,
                [&](const auto& kernels, const auto& schedule) { kernels.forward(problem, schedule, threads); });
  return {};
}

// The log-sum-exp in base 2 and delta of every row.
std::size_t neighborhood_attention_backward_workspace(const NeighborhoodAttentionBackward& problem, const Threads&) {
  return 2 * sizeof(float) * static_cast<std::size_t>(num_rows(problem.forward));
}

Status neighborhood_attention_backward(const NeighborhoodAttentionBackward& problem, const Threads& threads) {
  if (Status status = validate(problem); !status.ok() || problem.forward.k.size() == 0) {
    return status;  // without keys there are no queries either
  }
  if (num_rows(problem.forward) > 0 && problem.workspace == nullptr) {
    return failure("neighborhood_attention_backward: workspace has no data");
  }
  if (kernels() == nullptr) {
    return no_cpu_kernels("neighborhood_attention_backward");
  }
  with_schedule(problem.forward,
                [&](const auto& kernels, const auto& schedule) { kernels.backward(problem, schedule, threads); });
  return {};
}

#if !FASTATTN_WITH_CUDA

Status neighborhood_attention(const NeighborhoodAttention&, Stream) {
  return built_without_cuda("neighborhood_attention");
}

std::size_t neighborhood_attention_backward_workspace(const NeighborhoodAttentionBackward&, Stream) { return 0; }

Status neighborhood_attention_backward(const NeighborhoodAttentionBackward&, Stream) {
  return built_without_cuda("neighborhood_attention_backward");
}

#endif

}  // namespace fastattn
