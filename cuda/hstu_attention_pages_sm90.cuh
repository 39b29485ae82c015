// The forward for Hopper: tiles of keys and values that come in boxes, from pages or from the rows of k and v, to one block or to both of a
// cluster.
#pragma once
#include "hstu_attention_sm90.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

// Where history stands in pages the copy engine brings boxes of kBox keys, each from one page or from the rows of k and v.
constexpr int kBox = 64, kAhead = 640;  // keys behind a tile that are on their way to L2
struct PageMaps {
  CUtensorMap k, v;  // [pages 2 S, H, D] and [.., V]: a page's keys, then its values
};
// Whether all boxes of keys j0 .. j0 + keys - 1 stand in one page each, or in none. What lies behind the last key may be anything.
template <typename T>
__device__ __forceinline__ bool stands_in_boxes(const Call<T>& p, const Sequence& s, int j0, int keys) {
  int split = s.paged / kBox * kBox;  // of the box that begins here, some keys are in a page and some are not
  return p.page_size % kBox == 0 && (split == s.paged || s.history == s.paged || split < j0 || split >= j0 + keys);
}
// The same of keys j0 .. of which `valid` are there, row by row, by a warp, which waits for the copies.
template <typename T, int kDim, int kTileRows>
__device__ __forceinline__ void load_rows(T* tile, const Rows<T>& rows, int j0, int valid, int dim) {
  constexpr int kPieces = kDim / 8;
#pragma unroll 4
  for (int x = threadIdx.x % 32; x < kTileRows * kPieces; x += 32) {
    int r = x / kPieces, d = x % kPieces * 8;
    bool there = r < valid && d < dim;
    copy_async<16>(shared_address(tile) + swizzled<T, kDim>(kTileRows, r, d), there ? rows.at(j0 + r) + d : rows.pages, there ? 16 : 0);
  }
  copy_async_commit();
}

// Warp 0 of the loading warpgroup, where history stands in pages or an item is shared. The copy engine brings boxes of kBox keys; a tile of which some box is partly in a page and
// partly in the rows of k and v comes row by row, by the warp.
template <typename T, int kDim, Mode kMode, bool kShared>
__device__ __forceinline__ void load_paged_tiles(Shared<T, kDim, kMode, kShared>& shared, const CUtensorMap& q_map,
                                                 const CUtensorMap& k_map, const CUtensorMap& v_map, const PageMaps& pages,
                                                 const Call<T>& p) {
  using C = Config<kDim, kMode, kShared>;
  static_assert(!kShared || C::kKeys == C::kBlocks * kBox);
  int lane = threadIdx.x % 32, rank = kShared ? cluster_rank() : 0;
  Ring<C::kRing> ring;
  Ring<C::kQueries> q_ring;
  for (Ring<kSlots> turn;; turn.next()) {
    shared.work_full[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    if (!work.there()) return;
    int window = -2, listed = 0, next = 0, fetched = 0;  // lane l has entries 32 window + l, 32 window + 32 + l of the sequence's pages
    auto turn_to = [&](int j) {
      int now = j / p.page_size / 32;
      if (now == window) return;
      auto entry = [&](int x) { return x * p.page_size < work.s.paged ? shared.keys[turn.stage].table[x] : 0; };
      listed = now == window + 1 ? next : entry(32 * now + lane), next = entry(32 * now + 32 + lane), window = now;
    };
    auto slot_of = [&](int j, bool values) {  // among all slots of the pages; of the tile, or soon after it
      int entry = j / p.page_size, page = __shfl_sync(kFullWarp, entry / 32 == window ? listed : next, entry % 32);
      return (2 * page + values) * p.page_size + j % p.page_size;
    };
    // To L2: what is read by TMA alone, two tiles ahead, waits for memory.
    auto fetch = [&](int n) {
      if (p.page_size % kBox) return;
      for (fetched = max(fetched, n + C::kRing); fetched <= n + kAhead / C::kKeys; ++fetched)
#pragma unroll 1
        for (int j = fetched * C::kKeys; j < min((fetched + 1) * C::kKeys, work.s.paged / kBox * kBox); j += kBox) {
          int slot = slot_of(j, false);
          if (lane < 2 && (!kShared || j / kBox % 2 == rank)) prefetch_rows<T, kDim>(lane ? pages.v : pages.k, work.head, slot + lane * p.page_size);
        }
    };
    auto bring = [&](T* tile, const CUtensorMap& map, const CUtensorMap& page_map, bool values, int n, Barrier& full) {
      int j0 = n * C::kKeys, valid = min(work.s.history - j0, C::kKeys);
      if (!stands_in_boxes(p, work.s, j0, C::kKeys)) {
        int dim = values ? p.value_dim : p.key_dim;
        load_rows<T, kDim, C::kKeys>(tile, values ? shared.values[turn.stage] : shared.keys[turn.stage], j0, valid, dim);
        copy_async_wait<0>();
        fence_async();
        __syncwarp();
        if (lane == 0) full.arrive();
        return;
      }
      if (lane == 0) full.expect((valid + kBox - 1) / kBox * (kBox * kDim * int(sizeof(T))));
#pragma unroll 1
      for (int r = 0; r < valid; r += kBox) {
        bool paged = j0 + r < work.s.paged;
        int row = paged ? slot_of(j0 + r, values) : int(work.s.key) + j0 + r - work.s.paged;
        if (lane == 0 && (!kShared || r / kBox == rank))
          load_tile_rows<T, kDim, C::kKeys, C::kBlocks>(tile, r, paged ? page_map : map, work.head, row, full);
      }
    };
    bool q_to_come = true;
    auto bring_q = [&] {
      shared.q_empty[q_ring.stage].wait(q_ring.parity ^ 1);
      if (lane == 0)
        load<T, kDim, C::kRows>(shared.q[q_ring.stage], q_map, work.head, work.s.query + work.first, shared.q_full[q_ring.stage]);
      q_ring.next(), q_to_come = false;
    };
    if (C::kQueries > 1) bring_q();
    for (int n = work.tiles.from(work.begin); n < work.tiles.last; n = work.tiles.from(n + 1)) {
      turn_to(n * C::kKeys);
      shared.k_empty[ring.stage].wait(ring.parity ^ 1);
      bring(shared.k[ring.stage], k_map, pages.k, false, n, shared.k_full[ring.stage]);
      if (q_to_come) bring_q();
      shared.v_empty[ring.stage].wait(ring.parity ^ 1);
      bring(shared.v[ring.stage], v_map, pages.v, true, n, shared.v_full[ring.stage]);
      fetch(n);
      ring.next();
    }
    if (q_to_come) bring_q();
    __syncwarp();
    if (lane == 0) shared.work_empty[turn.stage].arrive();
  }
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
