#include "../dispatch.h"
#include "../ops.h"
#include "jagged.h"
#include "scratch.h"

namespace hstu::cpu {

// The ops that it stands for, one after the other.
void ranker_head(Tensor& y, Tensor* states, const Tensor* known, const Tensor& x, const Tensor& rows, const Tensor* last,
                 const Tensor& groups, const Tensor& state_weight, const Tensor& w, const Tensor& bias, const Tensor& norm_weight,
                 const Tensor& norm_bias, const Tensor& w_out, const Tensor& bias_out, double eps, Stream stream) {
  HSTU_CHECK(!states == !last && !states != !known, kInvalidArgument, "ranker_head: states and last go together, or known is given");
  pick_float("ranker_head", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t d = x.cols(), hidden = w.cols();
    auto matrix = [&](T* data, int64_t count, int64_t cols) { return Tensor{data, x.dtype, x.device, 2, {count, cols}, {cols, 1}}; };
    auto product = [&](Tensor& to, const Tensor& ids, const Tensor& weight, const Tensor* shift, const Tensor* more) {
      Scratch<T> own(ids.size() * d);
      Tensor taken = matrix(own, ids.size(), d);
      embedding({{taken}}, {{x}}, ids, stream);
      linear(to, nullptr, taken, weight, shift, more, Activation::kNone, stream);
    };
    if (last) product(*states, *last, state_weight, nullptr, nullptr);
    Scratch<T> own(rows.size() * hidden), more(rows.size() * hidden);
    Tensor z = matrix(own, rows.size(), hidden), each = matrix(more, rows.size(), hidden);
    expand(each, states ? *states : *known, groups, stream);
    product(z, rows, w, &bias, &each);
    swish_layer_norm(each, z, &norm_weight, &norm_bias, eps, stream);
    linear(y, nullptr, each, w_out, &bias_out, nullptr, Activation::kNone, stream);
  });
}

}  // namespace hstu::cpu
