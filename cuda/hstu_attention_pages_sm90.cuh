// The forward for Hopper: tiles of keys and values that come in boxes, from pages or from the rows of k and v.
#pragma once
#include "hstu_attention_sm90.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

constexpr int kBox = 64;
struct PageMaps {
  CUtensorMap k, v;  // [pages 2 S, H, D] and [.., V]: a page's keys, then its values
};
// Keys or values j0 .. of which `valid` are there, row by row, by a warp, which waits for the copies.
template <typename T, int kDim, int kTileRows>
__device__ __forceinline__ void load_rows(T* tile, const Rows<T>& rows, int j0, int valid, int dim) {
  constexpr int kPieces = kDim / 8;
#pragma unroll 1
  for (int x = threadIdx.x % 32; x < kTileRows * kPieces; x += 32) {
    int r = x / kPieces, d = x % kPieces * 8;
    bool there = r < valid && d < dim;
    copy_async<16>(shared_address(tile) + swizzled<T, kDim>(kTileRows, r, d), there ? rows.at(j0 + r) + d : rows.pages, there ? 16 : 0);
  }
  copy_async_commit();
}

// Tiles of Q and K, of V, or all, where history stands in pages, by a warp. The copy engine brings boxes of kBox keys, each from one page
// or from the rows of k and v; a tile of which some box would come from both, or of pages that are no whole boxes, comes row by row. What lies
// behind the last key may be anything. There are 2000 cycles a tile, so where boxes stand is found for 32 of them at once.
enum { kKeyTiles = 1, kValueTiles = 2 };
template <int kWhat, typename T, int kDim, Mode kMode, bool kFew>
__device__ __forceinline__ void load_paged_tiles(std::integral_constant<int, kWhat>, Shared<T, kDim, kMode, kFew>& shared,
                                                 const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                                 const PageMaps& pages, const Call<T>& p) {
  using C = Config<kDim, kMode, kFew>;
  constexpr int kBoxes = C::kKeys / kBox;  // of a tile
  constexpr int kSoon = 512 / C::kKeys;    // tiles before an item's end
  constexpr bool kAsks = C::kLoading > 32;  // else registers are too short
  int lane = threadIdx.x % 32;
  Ring<C::kRing> ring;
  Ring<C::kQueries> q_ring;
  for (Ring<kSlots> turn;; turn.next()) {
    shared.work_known[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    if (work.rows <= 0) return;
    const Rows<T>&keys = shared.keys[turn.stage], &values = shared.values[turn.stage];
    int paged = work.s.paged, mixed = paged % kBox > 0 && work.s.history > paged ? paged / kBox : -1;  // a box of both kinds
    bool in_boxes = p.page_size % kBox == 0;
    // Lane l knows where boxes 32 window + l and 32 window + 32 + l begin: a slot of the pages, or ~row of k and v.
    int window = -2, listed = 0, next = 0;
    auto place = [&](int box) {
      int j = box * kBox;
      if (j >= paged) return ~(int(work.s.key) + j - paged);
      int entry = j / p.page_size;
      return (2 * keys.table[entry] - entry) * p.page_size + j;
    };
    auto turn_to = [&](int box) {
      int now = box / 32;
      if (now == window) return;
      listed = now == window + 1 ? next : place(32 * now + lane), next = place(32 * now + 32 + lane), window = now;
    };
    auto place_of = [&](int box) { return __shfl_sync(kFullWarp, box / 32 == window ? listed : next, box % 32); };
    auto bring = [&](T* tile, auto what, int n, Barrier& full) {
      constexpr bool of_values = decltype(what)::value;
      int first = n * kBoxes, rest = work.s.history - n * C::kKeys;
      if (!in_boxes || (first <= mixed && mixed < first + kBoxes)) {
        load_rows<T, kDim, C::kKeys>(tile, of_values ? values : keys, n * C::kKeys, rest, of_values ? p.value_dim : p.key_dim);
        copy_async_wait<0>();
        fence_async();
        __syncwarp();
        full.arrive_for_warp(lane);
        return;
      }
      if (lane == 0) full.expect(min((rest + kBox - 1) / kBox, kBoxes) * (kBox * kDim * int(sizeof(T))));
      full.arrive_beside(lane);
#pragma unroll
      for (int x = 0; x < kBoxes; ++x) {
        if (x * kBox >= rest) break;
        int at = place_of(first + x);
        const CUtensorMap& map = at < 0 ? of_values ? v_map : k_map : of_values ? pages.v : pages.k;
        int row = at < 0 ? ~at : at + of_values * p.page_size;
        if (lane == 0) load_tile_rows<T, kDim, C::kKeys>(tile, x * kBox, map, work.head, row, full);
      }
    };
    // Targets' own keys and values, which come last, to L2.
    auto ask_for_own = [&](const CUtensorMap& map, int dim) {
      int begin = work.s.shift + work.first, j = max(begin, work.s.history) + kBox * lane;
      if (others_of(shared, turn.stage) < 0 || j >= begin + work.rows) return;
      for (int d = 0; d < dim; d += kRowBytes<T, kDim> / int(sizeof(T))) prefetch_box(map, d, work.head, int(work.s.key) + j - paged);
    };
    bool q_to_come = kWhat & kKeyTiles;
    auto bring_q = [&] {
      shared.q_empty[q_ring.stage].wait(q_ring.parity ^ 1);
      if (lane == 0)
        load<T, kDim, C::kRows>(shared.q[q_ring.stage], q_map, work.head, work.s.query + work.first, shared.q_full[q_ring.stage]);
      q_ring.next(), q_to_come = false;
    };
    if (C::kQueries > 1 && q_to_come) bring_q();
    for (int n = first_tile(shared, turn.stage); n < work.tiles.last; n = work.tiles.from(n + 1)) {
      turn_to(n * kBoxes);
      if (kAsks && n == work.tiles.last - kSoon) {
        if (kWhat & kKeyTiles) ask_for_own(k_map, p.key_dim);
        if (kWhat & kValueTiles) ask_for_own(v_map, p.value_dim);
      }
      if constexpr (kWhat & kKeyTiles) {
        shared.k_empty[ring.stage].wait(ring.parity ^ 1);
        bring(shared.k[ring.stage], std::false_type{}, n, shared.k_full[ring.stage]);
        if (q_to_come) bring_q();
      }
      if constexpr (kWhat & kValueTiles) {
        shared.v_empty[ring.stage].wait(ring.parity ^ 1);
        bring(shared.v[ring.stage], std::true_type{}, n, shared.v_full[ring.stage]);
      }
      ring.next();
    }
    if (q_to_come) bring_q();
    __syncwarp();
    shared.work_empty[turn.stage].arrive_for_warp(lane);
  }
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
