#include "softmax_loss.cuh"

#include "group_by.cuh"

namespace hstu::cuda {

void softmax_loss(Tensor& loss, Tensor& lse, const Tensor& query, const Tensor& table, const Tensor& positive_ids,
                  const Tensor* weights, int first_id, bool normalize_items, double temperature, double eps, Stream stream) {
  constexpr char kOp[] = "softmax_loss";
  pick_dtype(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    check_ids(kOp, "positive_ids", positive_ids.as<int64_t>(), positive_ids.size(), first_id, table.rows() - 1, stream,
              data_or_null<float>(weights));
    LossRows rows(kOp, query, table, weights, stream);
    NormFactors<T> norms(table, normalize_items, eps, stream);
    Scratch<float> losses(rows.total, stream);
    SoftmaxInputs<T> in(rows, query, table, positive_ids, norms.factors, first_id, temperature);
    fill(lse.data, 0, lse.bytes(), stream);  // of positions that do not count
    launch(score_corpus<T>, unsigned(ceil_div(rows.total, kOwned)), ScoreTile<T>::kThreads, 0, stream, losses.get(),
           lse.as<float>(), in);
    launch(finish_loss<>, 1, kCollectThreads, 0, stream, loss.as<float>(), losses.get(), rows.positions.get(), rows.weights,
           rows.totals.get());
  });
}

}  // namespace hstu::cuda
