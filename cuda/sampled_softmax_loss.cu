#include "group_by.cuh"
#include "sampled_softmax_loss.cuh"

namespace hstu::cuda {
namespace {

// A warp owns a packed row; its logits never leave the registers.
template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads) score_rows(float* losses, float* lse, SampledInputs<T> in) {
  int64_t i = int64_t(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (i >= in.totals->count) return;
  int64_t position = in.positions[i];
  float positive;
  RowSum row = score_row<kVector>(in, position, positive, [](int64_t, int32_t, float) {});
  if (threadIdx.x % 32 == 0) {
    losses[i] = row.loss(positive);
    lse[position] = row.lse(positive);
  }
}

}  // namespace

void sampled_softmax_loss(Tensor& loss, Tensor& lse, const Tensor& query, const Tensor& table, const Tensor& positive_ids,
                          const Tensor* weights, const Tensor* negative_ids, int num_negatives, int first_id,
                          bool normalize_items, double temperature, double eps, int64_t seed, int64_t offset, const Tensor* base,
                          Stream stream) {
  constexpr char kOp[] = "sampled_softmax_loss";
  pick_dtype(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t items = table.rows(), dims = table.cols();
    const float* weight = data_or_null<float>(weights);
    check_ids(kOp, "positive_ids", positive_ids.as<int64_t>(), positive_ids.size(), first_id, items - 1, stream, weight);
    if (negative_ids)
      check_ids(kOp, "negative_ids", negative_ids->as<int64_t>(), negative_ids->size(), first_id, items - 1, stream,
                negative_ids->rank == 1 ? nullptr : weight, num_negatives);
    LossRows rows(kOp, query, table, weights, stream);
    NormFactors<T> norms(table, normalize_items, eps, stream);
    Scratch<float> losses(rows.total, stream);
    SampledInputs<T> in{query.as<T>(), table.as<T>(), norms.factors, positive_ids.as<int64_t>(), rows.weights, rows.positions, rows.totals,
                        dims, float(1 / temperature), Negatives(negative_ids, num_negatives, first_id, items, seed, offset, base)};
    fill(lse.data, 0, lse.bytes(), stream);  // of positions that do not count
    pick_vector<T>(dims, in.query, in.table, [&](auto vector) {
      launch(score_rows<T, vector()>, unsigned(ceil_div(rows.total, kRowThreads / 32)), kRowThreads, 0, stream, losses.get(),
             lse.as<float>(), in);
    });
    launch(finish_loss<>, 1, kCollectThreads, 0, stream, loss.as<float>(), losses.get(), rows.positions.get(), rows.weights,
           rows.totals.get());
  });
}

}  // namespace hstu::cuda
