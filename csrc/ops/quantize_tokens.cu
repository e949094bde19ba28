// `quantize_tokens` on Hopper, of bf16 and fp16. See quantize_tokens.md, which decides every bit: this file is compiled
// without fast math.
#include <cstdint>

#include "fastattn/fastattn.hpp"
#include "ops/validate.hpp"
#include "sm90/quantize_tokens.hpp"
#include "sm90/run.cuh"

namespace fastattn {
namespace {

using namespace sm90;

constexpr const char* kOp = "quantize_tokens";
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Element, class Format, int kIndex>
__global__ void __launch_bounds__(kTokenThreads) rows_kernel(const __grid_constant__ QuantizeTokens p) {
  using Rows = TokenRows<Element, Format, kTokenWidths[kIndex].head_dim>;
  __shared__ std::uint32_t largest[Rows::kTokens];
  __shared__ float inverse[Rows::kTokens];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < Rows::kTokens) {
    largest[thread] = 0;
  }
  const Rows rows(p, token_part(p, Rows::parts(p), blockIdx.x), thread);
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < Rows::kPasses; ++pass) {
    std::uint32_t of_token = rows.largest(pass);
#pragma unroll
    for (int distance = Rows::kLanes / 2; distance > 0; distance /= 2) {
      of_token = max_of(of_token, __shfl_xor_sync(kAllLanes, of_token, distance));
    }
    if (thread % Rows::kLanes == 0) {
      atomicMax(&largest[rows.group(pass)], of_token);
    }
  }
  __syncthreads();
  if (thread < Rows::kTokens) {
    inverse[thread] = rows.write_scale(thread, largest[thread]);
  }
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < Rows::kPasses; ++pass) {
    rows.write_values(pass, inverse[rows.group(pass)]);
  }
}

template <class Element, class Format, int kIndex>
__global__ void __launch_bounds__(kTokenThreads) columns_kernel(const __grid_constant__ QuantizeTokens p) {
  using Columns = TokenColumns<Element, Format, kTokenWidths[kIndex].head_dim>;
  __shared__ typename Columns::Shared shared;
  const TokenPart part = token_part(p, Columns::parts(p), blockIdx.x);
  Columns::write_words(p, part, static_cast<int>(threadIdx.x), shared);
  __syncthreads();
  Columns::write_rows(p, part, static_cast<int>(threadIdx.x), shared);
}

template <class Element, int kIndex>
__global__ void __launch_bounds__(kTokenThreads) survey_kernel(const __grid_constant__ QuantizeTokens p) {
  using Survey = TokenSurvey<Element, kTokenWidths[kIndex].head_dim>;
  __shared__ typename Survey::Shared shared;
  const TokenPart part = token_part(p, Survey::parts(p), blockIdx.x);
  Survey::survey_rows(p, part, static_cast<int>(threadIdx.x), shared);
  __syncthreads();
  Survey::survey_chunk(p, part, static_cast<int>(threadIdx.x), shared);
}

// A warp for each channel.
template <class Format>
__global__ void __launch_bounds__(kTokenThreads) channels_kernel(const __grid_constant__ QuantizeTokens p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t channel = (std::int64_t{blockIdx.x} * kTokenThreads + threadIdx.x) / 32;
  if (channel >= num_channels(p)) {
    return;  // all of the warp
  }
  ChannelSurvey all = survey_chunks(p, channel, lane);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    all.add({__shfl_xor_sync(kAllLanes, all.mean, distance), __shfl_xor_sync(kAllLanes, all.least, distance),
             __shfl_xor_sync(kAllLanes, all.most, distance)});
  }
  if (lane == 0) {
    write_channel<Format>(p, channel, all);
  }
}

Status launch(void (*kernel)(QuantizeTokens), std::int64_t blocks, const QuantizeTokens& p, Stream stream) {
  return sm90::launch(kernel, blocks, kTokenThreads, 0, stream, p);
}

bool needs_survey(const QuantizeTokens& p) { return p.mean != nullptr || p.transpose; }

template <class Element, class Format, int kIndex>
Status run(const QuantizeTokens& p, Stream stream) {
  constexpr int kHeadDim = kTokenWidths[kIndex].head_dim;
  const std::int64_t heads = p.x.batch() * p.x.heads();
  Status status;
  if (needs_survey(p)) {
    status = launch(survey_kernel<Element, kIndex>, heads * TokenSurvey<Element, kHeadDim>::parts(p), p, stream);
    if (status.ok()) {
      constexpr int kWarps = kTokenThreads / 32;
      status = launch(channels_kernel<Format>, ceil_div<std::int64_t>(num_channels(p), kWarps), p, stream);
    }
  }
  if (!status.ok()) {
    return status;
  }
  return p.transpose ? launch(columns_kernel<Element, Format, kIndex>,
                              heads * TokenColumns<Element, Format, kHeadDim>::parts(p), p, stream)
                     : launch(rows_kernel<Element, Format, kIndex>,
                              heads * TokenRows<Element, Format, kHeadDim>::parts(p), p, stream);
}

// Calls run.operator()<Format>().
template <class Run>
Status with_format(TokenFormat format, Run&& run) {
  return format == TokenFormat::kInt8         ? run.template operator()<Int8>()
         : format == TokenFormat::kInt4       ? run.template operator()<Int4>()
         : format == TokenFormat::kInt4InByte ? run.template operator()<Int4InByte>()
                                              : run.template operator()<Float8E4M3>();
}

Status check_memory(const QuantizeTokens& p) {
  const auto aligned = [](const void* memory) { return reinterpret_cast<std::uintptr_t>(memory) % 16 == 0; };
  bool strides = true;
  for (int axis = 0; axis < 3; ++axis) {
    strides = strides && (p.x.shape[axis] <= 1 || p.x.stride[axis] % kUnit == 0);
  }
  if (p.x.size() > 0 && !(aligned(p.x.data) && strides)) {
    return failure(
        "%s: x must be 16-byte aligned and have strides of a multiple of 8 elements on the GPU, got address %p and "
        "strides [%lld, %lld, %lld, %lld]",
        kOp, p.x.data, static_cast<long long>(p.x.stride[0]), static_cast<long long>(p.x.stride[1]),
        static_cast<long long>(p.x.stride[2]), static_cast<long long>(p.x.stride[3]));
  }
  const struct {
    const char* name;
    const void* memory;
  } results[] = {{"values", p.values}, {"scales", p.scales}, {"mean", p.mean}};
  for (const auto& [name, memory] : results) {
    if (!aligned(memory)) {
      return failure("%s: %s must be 16-byte aligned on the GPU, got address %p", kOp, name, memory);
    }
  }
  return needs_survey(p) && p.x.size() > 0 && p.workspace == nullptr ? failure("%s: workspace has no data", kOp)
                                                                     : Status{};
}

}  // namespace

Status quantize_tokens(const QuantizeTokens& p, Stream stream) {
  return run_if_valid(kOp, p, p.x.dtype, [&]<class Element>() {
    const Status status = check_memory(p);
    return !status.ok() ? status : with_format(p.format, [&]<class Format>() {
      return dispatch<kTokenWidths>(kOp, p.x.head_dim(),
                                    [&]<int kIndex>() { return run<Element, Format, kIndex>(p, stream); });
    });
  });
}

std::size_t quantize_tokens_workspace(const QuantizeTokens& p, Stream) {
  const int tokens = static_cast<int>(min_of(p.x.seq(), kMaxSeq));  // nothing has judged the problem yet
  return needs_survey(p) ? num_channels(p) * num_chunks(tokens) * sizeof(ChannelSurvey) : 0;
}

}  // namespace fastattn
