// HSTU attention, forward, for Hopper (sm_90a): wgmma, TMA, silu with or without a bias on chip, softmax; see hstu_attention_sm90.cuh.
#include <cmath>

#include "hstu_attention_choice.cuh"
#include "hstu_attention_pages_sm90.cuh"
#include "hstu_attention_rows_sm90.cuh"

namespace hstu::cuda {
namespace attention {
namespace forward_sm90 {
namespace {

// A descriptor `by` times 16 bytes on, from its lower half: the upper one is a constant, which takes fewer registers.
template <int kBytes>
__device__ __forceinline__ uint64_t moved(uint32_t low, int by) {
  return by_rows<kBytes>(0) >> 32 << 32 | (low + by);
}

// A block is persistent: one warpgroup loads, the others own 64 query rows each of an item, a warp 16 of them, in the layout of the
// accumulators. K and V arrive tile by tile; S = Q K^T from shared memory, the weights stay in registers for O += P V. The scores of a tile
// and the values of the one before it are multiplied at the same time, and these values go on while the scores become weights; with a bias
// the scores begin as the position's bias / alpha. Targets' own groups come last, in float32. A row's bits depend on the order of its keys
// and the products of 16 keys, counted from key 0, alone: hidden keys and skipped tiles add exact zeros, all ways to a time bucket give the
// same bucket. Where keys are split between blocks (hstu_attention_split_sm90.cuh) sums of runs of keys are added in their order.
template <typename T, int kDim, Mode kMode, bool kFew>
__global__ void __launch_bounds__(Config<kDim, kMode, kFew>::kThreads, 1)
    hstu_attention_sm90_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                               const __grid_constant__ CUtensorMap v_map, const __grid_constant__ PageMaps pages,
                               const __grid_constant__ Call<T> p, const Plan plan, const Meeting meeting, T* out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<kDim, kMode, kFew>;
  constexpr int kRows = C::kRows, kKeys = C::kKeys, kRing = C::kRing, kGroups = C::kGroups;
  constexpr int kBytes = kRowBytes<T, kDim>, kColumns = kBytes / int(sizeof(T));
  constexpr int kShort = 1536;
  constexpr bool kBias = C::kBias, kSoftmax = kMode == Mode::kSoftmax, kAhead = C::kAhead;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, kDim, kMode, kFew>*>(memory);
  // What all lanes of a warp have, said so that the compiler keeps it in uniform registers.
  auto same = [](int x) { return __reduce_max_sync(kFullWarp, x); };
  int warp = same(threadIdx.x / 32), lane = threadIdx.x % 32, group = warp / 4 - 1;

  if (threadIdx.x == 0) {
    prefetch(q_map), prefetch(k_map), prefetch(v_map);
    if (p.kv_pages) prefetch(pages.k), prefetch(pages.v);
    shared.init(p.kv_pages && !kBias ? 2 : 1);
  }
  if constexpr (C::kSplits)
    if (meeting.sums && warp == 1) shared.shares.template deal<C>(p);
  if constexpr (kBias && kArrivalsOfWarp > 1)
    if (warp == 3 && !p.time_per_head) stage_times(shared, 0, kSlots, p, 0);
  __syncthreads();
  if (group < 0) {
    give_registers<C::kLoading>();
    if (kBias && warp == 3) prefetch_bias(p);
    constexpr std::integral_constant<int, kKeyTiles> kOfKeys;
    constexpr std::integral_constant<int, kValueTiles> kOfValues;
    constexpr std::integral_constant<int, kKeyTiles | kValueTiles> kAll;
    if (warp == 1) {
      draw_items(shared, p, plan, C::kSplits && meeting.sums);
    } else if constexpr (kBias) {
      if (warp > 1) stage_bias(shared, p, C::kSplits && meeting.sums);
      else if (p.kv_pages) load_paged_tiles(kAll, shared, q_map, k_map, v_map, pages, p);
      else load_tiles(shared, q_map, k_map, v_map, p);
    } else if (!p.kv_pages) {
      if (warp == 0) load_tiles(shared, q_map, k_map, v_map, p);
    } else if (warp == 0) {
      load_paged_tiles(kOfKeys, shared, q_map, k_map, v_map, pages, p);
    } else if (warp == 2) {
      load_paged_tiles(kOfValues, shared, q_map, k_map, v_map, pages, p);
    }
    return;
  }

  take_registers<C::kComputing>();
  int column0 = lane % 4 * 2;
  Ring<kRing> ring;
  if (C::kTurns && group == 0) sm90::announce(kTurn, 256);
  auto my_turn = [&] {
    if constexpr (C::kTurns) meet(kTurn + group, 256);
  };
  auto your_turn = [&] {
    if constexpr (C::kTurns) sm90::announce(kTurn + (group + 1) % kGroups, 256);
  };
  auto release = [&](Barrier& barrier) { barrier.arrive_once(); };
  for (uint32_t item = 0;; ++item) {
    Ring<kSlots> turn = Ring<kSlots>::after(item);
    Ring<C::kQueries> q_ring = Ring<C::kQueries>::after(item);
    shared.work_full[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    const Sequence& s = work.s;
    if (work.rows <= 0) return;
    // Of a few tiles the last rows see noticeably more: groups take them in turns. Fragments of an item are added group by group.
    auto part_of_item = [&] { return item % 2 && !meeting.sums && work.tiles.last * kKeys <= kShort ? kGroups - 1 - group : group; };
    int part = part_of_item(), strip = 4 * part + warp % 4, row0 = 16 * strip + lane / 4;
    const VisibleKeys &some = shared.some[turn.stage][part], &every = shared.every[turn.stage][strip];

    float sums[kDim / 2], w[kKeys / 2];
    uint32_t weights[kKeys / 4];
#pragma unroll
    for (int x = 0; x < kDim / 2; ++x) sums[x] = 0.f;
    [[maybe_unused]] Softmax softmax{p.alpha * kLog2E};

    auto scores = [&](float (&w)[kKeys / 2], int stage) {
      uint32_t q_rows = by_rows<kBytes>(shared_address(shared.q[q_ring.stage]) + 64 * part * kBytes);
      if constexpr (kDim > 128 || (kBias && kDim > 64)) asm volatile("" : "+r"(q_rows));  // else all 16 of them are kept
      uint32_t k_rows = by_rows<kBytes>(shared_address(shared.k)) + stage * int(sizeof(shared.k[0]) / 16);
#pragma unroll
      for (int d = 0; d < kDim; d += 16)
        wgmma<T, false>(w, moved<kBytes>(q_rows, (d / kColumns * kRows * kBytes + d % kColumns * 2) / 16),
                        moved<kBytes>(k_rows, (d / kColumns * kKeys * kBytes + d % kColumns * 2) / 16), kBias || d > 0);
    };
    auto add_values = [&](int stage) {
      uint32_t v_columns = by_columns<kBytes>(shared_address(shared.v), kKeys * kBytes) + stage * int(sizeof(shared.v[0]) / 16);
#pragma unroll
      for (int x = 0; x < kKeys; x += 16) wgmma<T, true>(sums, weights + x / 4, moved<kBytes>(v_columns, x * kBytes / 16), true);
    };
    // w = factor s + the time's bias from whole times, for all keys of the tile.
    [[maybe_unused]] auto add_far_time = [&](const float (&s)[kKeys / 2], const Sequence& sequence, int j0) {
      float factor = p.unit * p.alpha;
#pragma unroll 1
      for (int y = 0; y < kKeys / 2; ++y) {
        int i = sequence.shift + work.first + row0 + y / 2 % 2 * 8, j = j0 + column0 + y / 4 * 8 + y % 2;
        float value = time_term(p, work.head, exact_bucket(p, sequence, i, j));
#pragma unroll
        for (int x = 0; x < kKeys / 2; ++x)
          if (x == y) w[x] = fmaf(factor, s[x], value);
      }
    };
    // Hidden keys of the tile.
    [[maybe_unused]] auto hide_all = [&](int j0, float value) {
      if (every.all(j0, j0 + kKeys)) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        VisibleKeys keys = shared.seen[turn.stage][row0 + 8 * half];
#pragma unroll
        for (int c0 = 0; c0 < kKeys; c0 += 64) {
          uint64_t seen = keys.bits(j0 + c0) >> column0;
#pragma unroll
          for (int x = 0; x < 8; ++x)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (!(uint32_t(x < 4 ? seen : seen >> 32) >> (8 * x % 32 + e) & 1)) w[c0 / 2 + 4 * x + 2 * half + e] = value;
        }
      }
    };
    // Weights of all keys of the tile.
    [[maybe_unused]] auto weigh = [&](int j0) {
      if constexpr (kSoftmax) {
        hide_all(j0, -kInfinity);
        softmax.weigh(w);
      } else {
        float factor = p.unit * p.alpha;
#pragma unroll
        for (int x = 0; x < kKeys / 2; ++x) w[x] = weight_of<T>(factor * w[x]);
        hide_all(j0, 0.f);
      }
    };
    [[maybe_unused]] auto hide = [&](float* v, int j) { hide_keys(v, &shared.seen[turn.stage][row0], j, column0); };
    // w = factor s + the time's bias, so that a weight of 0 comes of hidden ones.
    [[maybe_unused]] auto add_time = [&](const float (&scores)[kKeys / 2], const Piece (&piece)[kKeys / 32], int j0) {
      if constexpr (kBias) {
        auto& bias = shared.bias;
        float factor = p.unit * p.alpha;
        int flags = 0;
#pragma unroll
        for (int c = 0; c < kKeys / 32; ++c) flags |= piece[c].flags;
        if (flags == 0) {
#pragma unroll
          for (int x = 0; x < kKeys / 2; ++x) w[x] = fmaf(factor, scores[x], piece[x / 16].first);
          return;
        }
        unsigned lane = lane_id(), row = 16 * strip + lane / 4;
        int fixed[2] = {bias.row_near[turn.stage][row], bias.row_near[turn.stage][row + 8]};
        const int* near = &bias.near[ring.stage][lane % 4 * 2];
        if (flags == Piece::kTwo) {
#pragma unroll
          for (int c = 0; c < kKeys / 32; ++c)
            bias.template add_time<true>(w + 16 * c, scores + 16 * c, factor, piece[c], turn.stage, fixed, near + 32 * c);
          return;
        }
        if (flags & Piece::kFar) {
          add_far_time(scores, s, j0);
#pragma unroll
          for (int c = 0; c < kKeys / 32; ++c) hide(w + 16 * c, j0 + 32 * c);
          return;
        }
#pragma unroll
        for (int c = 0; c < kKeys / 32; ++c) {
          if (piece[c].flags & Piece::kHidden) {
#pragma unroll
            for (int x = 16 * c; x < 16 * c + 16; ++x) w[x] = 0.f;
            continue;
          }
          bias.template add_time<false>(w + 16 * c, scores + 16 * c, factor, piece[c], turn.stage, fixed, near + 32 * c);
          if (piece[c].flags & Piece::kPartly) hide(w + 16 * c, j0 + 32 * c);
        }
      }
    };
    auto round = [&](auto from, auto to) {
#pragma unroll
      for (int x = 8 * from; x < 8 * to; ++x) weights[x] = pack_pair<T>(w[2 * x], w[2 * x + 1]);
    };
    // Values behind the last key belong to others: they may be anything, and 0 times NaN is NaN.
    auto clear_tail = [&](int stage, int valid) {
      if (valid >= kKeys) return;
      unsigned char* tile = reinterpret_cast<unsigned char*>(shared.v[stage]);
#pragma unroll 1
      for (int x = valid * (kDim / 8) + 32 * (warp % 4) + lane_id(); x < kKeys * (kDim / 8); x += 128)
        *reinterpret_cast<uint4*>(tile + swizzled<T, kDim>(kKeys, x / (kDim / 8), x % (kDim / 8) * 8)) = uint4{0, 0, 0, 0};
      fence_async();
      meet(kGroup + group, 128);
    };
    [[maybe_unused]] auto sees = [&](int n) { return some.any(n * kKeys, (n + 1) * kKeys); };
    // The next tile that this warpgroup sees; others are given back.
    [[maybe_unused]] auto seek = [&](int n) {
      for (; n < work.tiles.last && !sees(n); n = work.tiles.from(n + 1)) {
        shared.k_full[ring.stage].wait(ring.parity), shared.v_full[ring.stage].wait(ring.parity);
        __syncwarp();
        release(shared.k_empty[ring.stage]), release(shared.v_empty[ring.stage]);
        ring.next();
        my_turn(), your_turn();
      }
      return n;
    };

    shared.q_full[q_ring.stage].wait(q_ring.parity);
    if constexpr (kBias) {
      auto& bias = shared.bias;
      KeyTiles tiles{same(work.tiles.gap), same(work.tiles.resume), same(work.tiles.last)};
      KeyTiles mine = KeyTiles::of({same(some.prefix), same(some.begin), same(some.end), 0}, kKeys);
      mine.last = min(mine.last, tiles.last), mine.gap = min(mine.gap, tiles.last);
      int history = same(s.history), i = s.shift + work.first + row0, n = same(first_tile(shared, turn.stage));
      // Times 16: the position difference of key 0 and a thread's second row. Below: how far behind the first one's that is.
      int place = (column0 - min(i + 8, history)) * 16 | (min(i + 8, history) - min(i, history));
      bool alike = same(s.shift + work.first + 64 * part + 64) <= history;  // no targets are among this warpgroup's rows
      // Tiles that only others see are given back.
      auto pass = [&](int until) {
        for (; n < until; n = tiles.from(n + 1), ring.next()) {
          shared.k_full[ring.stage].wait(ring.parity), shared.v_full[ring.stage].wait(ring.parity);
          __syncwarp();
          release(shared.k_empty[ring.stage]), release(shared.v_empty[ring.stage]);
        }
      };
      // Runs of tiles that this warpgroup sees. Ahead: the scores of the next tile are multiplied while those of this one become weights,
      // its values while the next one's get their bias. Else both at the same time, and the values go on while scores become weights.
      for (int from = mine.gap >= 0 && n >= mine.gap ? max(n, mine.resume) : n, end; from < mine.last; from = mine.from(end)) {
        end = from < mine.gap ? mine.gap : mine.last;
        pass(from);
        shared.k_full[ring.stage].wait(ring.parity);
        const char* positions = reinterpret_cast<const char*>(bias.pos[same(bias.part[ring.stage])]);
        float next[kAhead ? kKeys / 2 : 1];
        auto& s = pick_scores<kAhead>(next, w);
        // Scores begin as the position's bias / alpha, and the product is added to them.
        auto begin = [&](int n) {
          constexpr int kPair = int(sizeof(float2)), kMask = kPair * (std::remove_reference_t<decltype(bias)>::kPositions - 1);
          auto row = [&](int first) { return reinterpret_cast<const float2*>(positions + (first + n * kKeys * kPair & kMask)); };
          // A thread's second row, 8 on, has the first one's pairs a fragment later, unless targets are among them.
          int now = place;
          asm volatile("" : "+r"(now));
          const float2* b = row(now >> 1);
          float2 first[kKeys / 8 + 1];
#pragma unroll
          for (int x = 0; x <= kKeys / 8; ++x) first[x] = b[8 * x];
#pragma unroll
          for (int x = 0; x < kKeys / 8; ++x) {
            s[4 * x + 2] = first[x].x, s[4 * x + 3] = first[x].y;
            s[4 * x] = first[x + 1].x, s[4 * x + 1] = first[x + 1].y;
          }
          if (!alike) {
            const float2* a = row((now >> 1) + (now & 15) * kPair);
#pragma unroll
            for (int x = 0; x < kKeys / 8; ++x) {
              float2 pair = a[8 * x];
              s[4 * x] = pair.x, s[4 * x + 1] = pair.y;
            }
          }
          wgmma_fence();
          scores(s, ring.stage);
          wgmma_commit();
        };
        auto weigh = [&] {
#pragma unroll
          for (int x = 0; x < kKeys / 2; ++x) {
            w[x] = weight_of<T>(w[x]);
            asm volatile("" : "+f"(w[x]));  // stays between the waits
          }
        };
        auto multiply = [&](int stage) {
          wgmma_fence();
          add_values(stage);
          wgmma_commit();
        };
        Piece pieces[kKeys / 32];
        auto look = [&] {
#pragma unroll
          for (int c = 0; c < kKeys / 32; ++c) pieces[c] = bias.piece[ring.stage][strip][c];
        };
        begin(n);
        look();
        wgmma_wait<0>(s);
        for (Ring<kRing> now;; ++n) {
          add_time(s, pieces, n * kKeys);
          __syncwarp();
          if constexpr (kAhead) {
            wgmma_wait<0>(sums);
            bool more = n + 1 < end;  // what follows stands once: an item's end mostly waits for instructions
            Ring<kRing> before = now;
            now = ring;
            if (more) {
              ring.next();
              shared.k_full[ring.stage].wait(ring.parity);
              begin(n + 1);
            }
            // Under the scores' products; only what they need stands before them.
            release(shared.k_empty[now.stage]);
            if (n > from) release(shared.v_empty[before.stage]);
            shared.v_full[now.stage].wait(now.parity);
            weigh();
            clear_tail(now.stage, history - n * kKeys);
            if (more || kArrivalsOfWarp == 1) look();  // behind the last tile whatever stands there; racecheck would see it
            wgmma_wait<0>(s);
            round(0, kKeys / 32);
            multiply(now.stage);
            if (!more) break;
          } else {
            release(shared.k_empty[ring.stage]);
            weigh();
            shared.v_full[ring.stage].wait(ring.parity);
            wgmma_wait<0>(sums);
            if (n > from) release(shared.v_empty[now.stage]);
            round(0, kKeys / 32);
            if (n + 1 == end) break;
            now = ring;
            ring.next();
            shared.k_full[ring.stage].wait(ring.parity);
            begin(n + 1);
            clear_tail(now.stage, history - n * kKeys);
            multiply(now.stage);
            look();
            wgmma_wait<1>(s);
          }
        }
        if constexpr (!kAhead) {
          clear_tail(ring.stage, history - n * kKeys);
          multiply(ring.stage);
        }
        wgmma_wait<0>(sums);
        release(shared.v_empty[ring.stage]);
        n = tiles.from(n + 1), ring.next();
      }
      pass(tiles.last);
    } else {
      // Runs of tiles that this warpgroup sees: the scores of a tile and the values of the one before it are multiplied at the same time.
      for (int n = seek(first_tile(shared, turn.stage)); n < work.tiles.last; n = seek(n)) {
        shared.k_full[ring.stage].wait(ring.parity);
        my_turn();
        wgmma_fence();
        scores(w, ring.stage);
        wgmma_commit();
        your_turn();
        wgmma_wait<0>(w);
        release(shared.k_empty[ring.stage]);
        weigh(n * kKeys);
        if constexpr (kSoftmax) softmax.rescale(sums);
        round(0, kKeys / 32);
        Ring<kRing> now;
        for (;;) {
          now = ring;
          ring.next();
          shared.v_full[now.stage].wait(now.parity);
          clear_tail(now.stage, s.history - n * kKeys);
          n = work.tiles.from(n + 1);
          if (n >= work.tiles.last || !sees(n)) break;
          shared.k_full[ring.stage].wait(ring.parity);
          my_turn();
          wgmma_fence();
          scores(w, ring.stage);
          wgmma_commit();
          add_values(now.stage);
          wgmma_commit();
          your_turn();
          wgmma_wait<1>(w);
          release(shared.k_empty[ring.stage]);
          weigh(n * kKeys);
          wgmma_wait<0>(sums);
          release(shared.v_empty[now.stage]);
          if constexpr (kSoftmax) softmax.rescale(sums);
          round(0, kKeys / 32);
        }
        wgmma_fence();
        add_values(now.stage);
        wgmma_commit();
        wgmma_wait<0>(sums);
        release(shared.v_empty[now.stage]);
      }
    }

    T* tile = shared.q[q_ring.stage];
    auto give_back = [&] {
      __syncwarp();
      fence_async();
      release(shared.q_empty[q_ring.stage]), release(shared.work_empty[turn.stage]);
    };
    int others = others_of(shared, turn.stage), own_strip = 4 * part_of_item() + warp % 4;  // anew: registers are short
    if (others > 0) gather<4 * kGroups>(sums, others, meeting);
    add_own<T, kDim, kMode>(sums, softmax, shared, turn.stage, own_strip, p, tile);
    meet(kGroup + group, 128);
    if (others < 0) leave<4 * kGroups>(sums, meeting), give_back();
    else store_rows<T, kDim, kMode, kRows>(sums, softmax, work, own_strip, p, tile, out, lse, give_back);
  }
#endif
}

template <typename T, int kDim, Mode kMode, bool kFew = false>
void run(const Call<T>& p, bool deterministic, T* out, float* lse, int64_t query_rows, int64_t key_rows, Stream stream) {
  using C = Config<kDim, kMode, kFew>;
  static_assert(sizeof(Shared<T, kDim, kMode, kFew>) <= kHopperShared);
  if constexpr (C::kBias && kDim == 128 && !kFew)
    if ((query_rows / 128 + p.sequences) * p.heads <= processors() && p.sequences <= kFewSequences)
      return run<T, kDim, kMode, true>(p, deterministic, out, lse, query_rows, key_rows, stream);
  int64_t most_tiles = query_rows / C::kRows + p.sequences, most = most_tiles * p.heads;
  bool split = C::kSplits && !deterministic && most_tiles <= kMostTiles && most <= kMostShares * processors() && p.max_seq_len <= kMostKeys;
  if constexpr (kMode == Mode::kSilu && kDim == 128 && !kFew)
    if (split && fits_better(query_rows, p.sequences, Config<kDim, kMode, true>::kRows, C::kRows))
      return run<T, kDim, kMode, true>(p, deterministic, out, lse, query_rows, key_rows, stream);
  bool few = !split && p.sequences <= kFewSequences && most <= processors();
  HSTU_CHECK(most <= INT_MAX / 2, kInvalidArgument, "hstu_attention: ", query_rows, " rows of ", p.heads,
             " heads are too many for one call");
  CUtensorMap q_map = tensor_map<T, kDim>(p.q, query_rows, p.heads, p.key_dim, C::kRows), k_map = q_map, v_map = q_map;
  PageMaps pages{q_map, q_map};
  if (p.kv_pages) {
    int64_t rows = 2 * p.page_size * p.page_count;
    HSTU_CHECK(rows <= INT_MAX, kInvalidArgument, "hstu_attention: ", p.page_count, " pages of ", p.page_size,
               " slots are too many for one call");
    pages.k = tensor_map<T, kDim>(p.kv_pages, rows, p.heads, p.key_dim, kBox, p.page_width);
    pages.v = tensor_map<T, kDim>(p.kv_pages, rows, p.heads, p.value_dim, kBox, p.page_width);
  }
  if (key_rows > 0) {  // else all keys stand in pages
    int box = p.kv_pages ? kBox : C::kKeys;
    k_map = tensor_map<T, kDim>(p.k, key_rows, p.heads, p.key_dim, box);
    v_map = tensor_map<T, kDim>(p.v, key_rows, p.heads, p.value_dim, box);
  }
  bool planned = !few && !split, ordered = planned && p.max_seq_len <= uint64_t(kLevels * C::kRows);
  Scratch<RowTile> order(planned ? most_tiles : 0, stream);
  Scratch<int> counts(p.sequences + 3, stream);
  int sorted = ordered ? first_sorted(p.sequences, most, processors()) : p.sequences;
  int64_t ranges = split ? most * ceil_div(int64_t(p.max_seq_len), C::kKeys) / C::kLeastRange : 0;
  dim3 blocks(unsigned(std::min<int64_t>(std::max(most, ranges), processors())));
  Plan plan{planned ? order.get() : nullptr, counts, counts + 1, sorted, p.sequences, p.heads,
            ordered && sorted == 0 ? int(blocks.x) / p.heads : 0};
  auto kernel = hstu_attention_sm90_kernel<T, kDim, kMode, kFew>;
  constexpr size_t shared = sizeof(Shared<T, kDim, kMode, kFew>);
  if (planned) launch(plan_kernel<T>, dim3(1), dim3(kLevels), 0, stream, p, counts + 2, plan, C::kRows);
  MeetingMemory memory(split ? blocks.x : 0, C::kRows * kDim / 4, 4 * C::kGroups, stream);
  launch_early(planned, kernel, blocks, dim3(C::kThreads), shared, stream, q_map, k_map, v_map, pages, p, plan, memory, out, lse);
}

}  // namespace
}  // namespace forward_sm90

template <typename T>
bool forward_on_hopper(const Call<T>& p, bool softmax, bool deterministic, T* out, float* lse, int64_t query_rows, int64_t key_rows,
                       Stream stream) {
  using namespace forward_sm90;
  bool bias = p.positions || p.last_bucket >= 0;
  if (softmax && (bias || p.dropout || !(p.alpha > 1e-20f && p.alpha < 1e20f))) return false;
  auto any = reinterpret_cast<const void*>(hstu_attention_sm90_kernel<T, 64, Mode::kSilu, false>);
  if (!takes_hopper(p, query_rows, key_rows, any)) return false;
  if (piece_of(out, p.value_dim) != 16) return false;
  if (bias && !(std::fabs(p.alpha) > 1e-20f && std::fabs(p.alpha) < 1e20f)) return false;  // scores begin as bias / alpha
  if (query_rows == 0 || p.sequences == 0) return true;
  int dim = std::max(p.key_dim, p.value_dim);
  pick<64, 128, 256>("head_dim",
                     dim <= 64    ? 64
                     : dim <= 128 ? 128
                                  : 256,
                     [&](auto bucket) {
                       constexpr int kDim = decltype(bucket)::value;
                       if (softmax)
                         run<T, kDim, Mode::kSoftmax>(p, deterministic, out, lse, query_rows, key_rows, stream);
                       else if (bias)
                         run<T, kDim, Mode::kSiluBias>(p, deterministic, out, lse, query_rows, key_rows, stream);
                       else
                         run<T, kDim, Mode::kSilu>(p, deterministic, out, lse, query_rows, key_rows, stream);
                     });
  return true;
}
template bool forward_on_hopper(const Call<__nv_bfloat16>&, bool, bool, __nv_bfloat16*, float*, int64_t, int64_t, Stream);
template bool forward_on_hopper(const Call<__half>&, bool, bool, __half*, float*, int64_t, int64_t, Stream);

}  // namespace attention
}  // namespace hstu::cuda
