// A matrix of 16- or 8-bit elements in shared memory, laid down as TMA writes it and as WGMMA reads it.
#pragma once

#include <cstdint>

#include "sm90/wgmma.cuh"

namespace fastattn::sm90 {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kWarpgroupRows = 64;

// A tile is panels side by side. Their rows are 128 bytes where whole panels of these make the tile, and eight 16-byte
// units are exchanged by exclusive-or with row % 8 (the 128-byte swizzle), so that both a row and a column of units
// touch every bank once. Else rows are 64 bytes, whose four units are exchanged by row / 2 % 4 (the 64-byte swizzle).
inline constexpr int kWidePanelRow = 128, kNarrowPanelRow = 64;

// Where a matrix product finds an operand in shared memory: its first step's descriptor, and how far the next ones are.
template <Major kMajor_, int kPanelBytes, int kRowBytes>
struct SharedOperand {
  static constexpr Major kMajor = kMajor_;
  std::uint64_t descriptor;

  // Makes the descriptor at this point of the program, not where a product wants it.
  __device__ void pin() { asm volatile("" : "+l"(descriptor)); }

  // The descriptor of the i-th step: 16 contracted elements of 16 bits, or 32 of 8.
  __device__ std::uint64_t step(int i) const {
    if constexpr (kMajor == Major::K) {  // along a row: 32 bytes within a panel, then the next panel
      constexpr int kSteps = kRowBytes / 32;
      return descriptor + ((i / kSteps * kPanelBytes + i % kSteps * 32) >> 4);
    } else {  // along a column: 16 rows
      return descriptor + ((i * 16 * kRowBytes) >> 4);
    }
  }
};

template <class Element, int kRows_, int kColumns>
struct SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kRowBytes = kColumns * sizeof(Element) % kWidePanelRow == 0 ? kWidePanelRow : kNarrowPanelRow;
  static constexpr int kUnits = kRowBytes / 16;  // of a panel's row
  static constexpr int kPanelColumns = kRowBytes / sizeof(Element);
  static constexpr int kPanels = kColumns / kPanelColumns;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static_assert(kColumns % kPanelColumns == 0 && kRows % 8 == 0);
  static constexpr int kBytes = kPanels * kPanelBytes;

  alignas(1024) std::byte bytes[kBytes];

  __device__ std::byte* panel(int i) { return bytes + i * kPanelBytes; }

  // Where a unit of a row of a panel lies in it.
  static __device__ int unit_offset(int row, int unit) {
    return row * kRowBytes + (unit ^ (kRowBytes == kWidePanelRow ? row % 8 : row / 2 % 4)) * 16;
  }

  __device__ std::uint32_t address() const { return static_cast<std::uint32_t>(__cvta_generic_to_shared(bytes)); }

  // As an operand whose rows are the product's rows (or columns, for B), contracted along the tile's columns.
  __device__ SharedOperand<Major::K, kPanelBytes, kRowBytes> k_major(int first_row = 0) const {
    return {describe(first_row * kRowBytes)};
  }
  // As an operand whose columns are the product's rows (or columns, for B), contracted along the tile's rows.
  __device__ SharedOperand<Major::MN, kPanelBytes, kRowBytes> mn_major(int first_column = 0) const {
    return {describe(first_column / kPanelColumns * kPanelBytes)};
  }

 private:
  // PTX ISA, "Matrix descriptor format": address, leading and stride byte offsets in units of 16 bytes; the leading
  // offset leads from one panel to the next (MN-major only), the stride offset over eight rows.
  __device__ std::uint64_t describe(int offset) const {
    constexpr std::uint64_t kSwizzle = std::uint64_t{kRowBytes == kWidePanelRow ? 1 : 2} << 62;
    constexpr std::uint64_t kLeading = std::uint64_t{kPanelBytes >> 4} << 16;
    constexpr std::uint64_t kStride = std::uint64_t{8 * kRowBytes >> 4} << 32;
    return kSwizzle | kStride | kLeading | ((address() + offset) >> 4);
  }
};

}  // namespace fastattn::sm90
