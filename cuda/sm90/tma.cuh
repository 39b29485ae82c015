// Tiles of tensors by the copy engine: tensor maps (CUDA driver API, "Tensor Map Object Management") and cp.async.bulk.tensor (PTX ISA
// 9.7.9.25). The driver's entry point is asked for at run time: nothing links to libcuda.
#pragma once
#include <cuda.h>

#include "../common.cuh"
#include "barrier.cuh"

namespace hstu::cuda::sm90 {

// Bytes of a row in shared memory, and the swizzle that goes with it: 16-byte pieces of a row are permuted by the row's index mod 8
// (128 bytes) or by half of it mod 4 (64 bytes), so that a column of eight rows meets all banks.
template <typename T, int kDim>
constexpr int kRowBytes = kDim* int(sizeof(T)) >= 128 ? 128 : 64;

// x [rows, heads, dim], heads `width` elements apart (0: dim), in boxes of box_rows rows of one head by kRowBytes: zeros where a box reaches
// beyond the tensor.
template <typename T, int kDim>
CUtensorMap tensor_map(const T* data, int64_t rows, int heads, int dim, int box_rows, int width = 0) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    HSTU_CHECK(found == cudaDriverEntryPointSuccess, kDevice, "this CUDA driver has no cuTensorMapEncodeTiled: update it");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  static_assert(sizeof(T) == 2);
  constexpr int kBytes = kRowBytes<T, kDim>;
  CUtensorMap map;
  cuuint64_t sizes[3] = {cuuint64_t(dim), cuuint64_t(heads), cuuint64_t(rows)};
  width = width ? width : dim;
  cuuint64_t strides[2] = {cuuint64_t(width) * sizeof(T), cuuint64_t(heads) * width * sizeof(T)};
  cuuint32_t box[3] = {kBytes / sizeof(T), 1, cuuint32_t(box_rows)}, steps[3] = {1, 1, 1};
  CUresult status = encode(&map, std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                           const_cast<T*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           kBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  HSTU_CHECK(status == CUDA_SUCCESS, kDevice, "cuTensorMapEncodeTiled: error ", int(status), " for ", rows, " rows, ", heads, " heads of ",
             dim);
  return map;
}

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
// One box from (row, head, column d), which completes on `barrier`.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int d, int head, int row, Barrier& barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
               "l"(reinterpret_cast<uint64_t>(&map)), "r"(d), "r"(head), "r"(row), "r"(barrier.address())
               : "memory");
}
// A box back, in this thread's bulk group (bulk.cuh).
__device__ __forceinline__ void store_box(const CUtensorMap& map, int d, int head, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(reinterpret_cast<uint64_t>(&map)),
               "r"(d), "r"(head), "r"(row), "r"(from)
               : "memory");
}
// Asks for a box to be in L2 soon.
__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, int d, int head, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(reinterpret_cast<uint64_t>(&map)), "r"(d), "r"(head),
               "r"(row)
               : "memory");
}

// A tile in shared memory: chunks of columns, [chunk][row][kRowBytes], swizzled. The byte of element (row, d) of a tile of `rows` rows.
template <typename T, int kDim>
__device__ __forceinline__ uint32_t swizzled(int rows, int row, int d) {
  constexpr int kBytes = kRowBytes<T, kDim>;
  int byte = d * int(sizeof(T)), chunk = byte / kBytes, unit = byte % kBytes / 16;
  int swizzle = kBytes == 128 ? row & 7 : row >> 1 & 3;
  return (chunk * rows + row) * kBytes + (unit ^ swizzle) * 16 + byte % 16;
}

// A tile of kTileRows rows of one head from row `row` on; one thread. `full` has to expect its bytes.
template <typename T, int kDim, int kTileRows>
__device__ __forceinline__ void load_tile(T* tile, const CUtensorMap& map, int head, int64_t row, Barrier& full) {
  constexpr int kBytes = kRowBytes<T, kDim>, kColumns = kBytes / int(sizeof(T));
#pragma unroll
  for (int d = 0; d < kDim; d += kColumns) load_box(shared_address(tile) + d / kColumns * kTileRows * kBytes, map, d, head, int(row), full);
}
// The same for rows of the tile from `first` (a multiple of 8) on, as many as a box of the map has.
template <typename T, int kDim, int kTileRows>
__device__ __forceinline__ void load_tile_rows(T* tile, int first, const CUtensorMap& map, int head, int64_t row, Barrier& full) {
  load_tile<T, kDim, kTileRows>(tile + first * (kRowBytes<T, kDim> / int(sizeof(T))), map, head, row, full);
}

}  // namespace hstu::cuda::sm90
