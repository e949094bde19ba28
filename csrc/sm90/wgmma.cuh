// Warpgroup matrix multiply-accumulate: 64 × N accumulators in the registers of 128 threads, operands in shared memory
// (described by 64-bit descriptors) or, for A, in registers. The instructions themselves are CUTLASS's atoms.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>

#include <cstdint>
#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>
#include <utility>

#include "fastattn/operand/low_bit.hpp"

namespace fastattn::sm90 {

using Major = cute::SM90::GMMA::Major;

// What the tensor cores and the conversion units call our element types.
template <class Element>
struct DeviceElement;

template <>
struct DeviceElement<BFloat16> {
  using Mma = cutlass::bfloat16_t;
  static __device__ std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
  static __device__ float2 unpack(std::uint32_t pair) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  }
};

template <>
struct DeviceElement<Float16> {
  using Mma = cutlass::half_t;
  static __device__ std::uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
  static __device__ float2 unpack(std::uint32_t pair) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }
};

// Elements of 8 bits go through the tensor cores as they are. Weights are made of floats, in two steps: pair() rounds
// two of them, join() makes a register of two pairs, the first one low.
template <>
struct DeviceElement<std::int8_t> {
  using Mma = std::int8_t;
};

template <>
struct DeviceElement<UInt8> {
  using Mma = std::uint8_t;
  // Floats near 2^23 are integers, whose lowest byte is a weight's.
  static __device__ std::uint32_t pair(float low, float high) {
    constexpr float kShift = 0x1p23f;
    return __byte_perm(__float_as_uint(low + kShift), __float_as_uint(high + kShift), 0x0040);
  }
  static __device__ std::uint32_t join(std::uint32_t low, std::uint32_t high) { return __byte_perm(low, high, 0x5410); }
};

template <>
struct DeviceElement<Float8E4M3> {
  using Mma = cutlass::float_e4m3_t;
  static __device__ std::uint32_t pair(float low, float high) {
    std::uint32_t rounded;
    asm("{\n"
        ".reg .b16 pair, zero;\n"
        "cvt.rn.satfinite.e4m3x2.f32 pair, %2, %1;\n"
        "mov.b16 zero, 0;\n"
        "mov.b32 %0, {pair, zero};\n"  // the conversion leaves it so, but the compiler does not know
        "}"
        : "=r"(rounded)
        : "f"(low), "f"(high));
    return rounded;
  }
  static __device__ std::uint32_t join(std::uint32_t low, std::uint32_t high) { return __byte_perm(low, high, 0x5410); }
};

namespace wgmma {

// Orders register and shared-memory accesses before the products that follow.
__device__ inline void fence() { cute::warpgroup_arrive(); }
// Closes a group of products.
__device__ inline void commit() { cute::warpgroup_commit_batch(); }
// Waits until at most kPending of the youngest groups are unfinished.
template <int kPending>
__device__ inline void wait() {
  cute::warpgroup_wait<kPending>();
}

// Pins registers at this point of the program: an accumulator must not be read before the wait, nor the registers of an
// A operand be given to something else while a product may still read them.
template <class Register, int kCount>
__device__ inline void pin(Register (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    cute::warpgroup_fence_operand(registers[i]);
  }
}

// What a product of two elements is added up in: exactly, for integers.
template <class Element>
using Sum = std::conditional_t<std::is_same_v<Element, std::int8_t>, std::uint32_t, float>;

// How many contracted elements a step has: 32 bytes of them.
template <class Element>
inline constexpr int kStep = 32 / sizeof(Element);

template <class Element, int kColumns, Major kA, Major kB>
using AtomSS = decltype(cute::SM90::GMMA::ss_op_selector<
                        typename DeviceElement<Element>::Mma, typename DeviceElement<Element>::Mma,
                        std::conditional_t<std::is_same_v<Sum<Element>, float>, float, std::int32_t>,
                        cute::Shape<cute::_64, cute::Int<kColumns>, cute::Int<kStep<Element>>>, kA, kB>());
template <class Left, class Right, int kColumns, Major kB>
using AtomRS = decltype(cute::SM90::GMMA::rs_op_selector<
                        typename DeviceElement<Left>::Mma, typename DeviceElement<Right>::Mma,
                        std::conditional_t<std::is_same_v<Sum<Right>, float>, float, std::int32_t>,
                        cute::Shape<cute::_64, cute::Int<kColumns>, cute::Int<kStep<Right>>>, Major::K, kB>());

constexpr auto scale_out(bool accumulate) {
  return accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
}

// d (+)= A · B with kDepth contracted elements; both operands in shared memory. `accumulate` false overwrites d.
template <class Element, int kDepth, class A, class B, int kCount>
__device__ inline void multiply(A a, B b, Sum<Element> (&d)[kCount], bool accumulate) {
  using Atom = AtomSS<Element, kCount * 2, A::kMajor, B::kMajor>;
#pragma unroll
  for (int step = 0; step < kDepth / kStep<Element>; ++step) {
    const auto scale = scale_out(accumulate || step > 0);
    [&]<std::size_t... i>(std::index_sequence<i...>) {
      Atom::fma(a.step(step), b.step(step), d[i]..., scale);
    }(std::make_index_sequence<kCount>{});
  }
}

// d (+)= A · B, with A in registers: four a step.
template <class Left, class Right, class B, int kRegisters, int kCount>
__device__ inline void multiply(const std::uint32_t (&a)[kRegisters], B b, Sum<Right> (&d)[kCount], bool accumulate) {
  using Atom = AtomRS<Left, Right, kCount * 2, B::kMajor>;
#pragma unroll
  for (int step = 0; step < kRegisters / 4; ++step) {
    const auto scale = scale_out(accumulate || step > 0);
    [&]<std::size_t... i>(std::index_sequence<i...>) {
      Atom::fma(a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3], b.step(step), d[i]..., scale);
    }(std::make_index_sequence<kCount>{});
  }
}

}  // namespace wgmma
}  // namespace fastattn::sm90
