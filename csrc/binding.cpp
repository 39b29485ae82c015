// The addon: one HSTU_BIND row an op, and what the environment that loads it gets beside.
#include <mutex>

#include "binder.h"

namespace hstu {
namespace {

#ifdef HSTU_CUDA
#define HSTU_BIND(name) bind(exports, signatures, #name, parameters::name, &cpu::name, &cuda::name);
#else
#define HSTU_BIND(name) bind(exports, signatures, #name, parameters::name, &cpu::name, decltype(&cpu::name)(nullptr));
#endif

Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  napi_set_instance_data(env, new Addon, [](napi_env, void* data, void*) { delete static_cast<Addon*>(data); }, nullptr);
  register_storage(exports);
  register_readback(exports);
  register_devices(exports);
  register_graphs(exports);
  register_pages(exports);
  register_vocabulary(exports);
  Napi::Object signatures = Napi::Object::New(env);
  exports.Set("signatures", signatures);
  static std::mutex& mutex = *new std::mutex;  // two workers may load at once; bind keeps a process-wide list
  std::lock_guard<std::mutex> lock(mutex);
  HSTU_BIND(hstu_attention)
  HSTU_BIND(hstu_attention_backward)
  HSTU_BIND(kv_append)
  HSTU_BIND(kv_gather)
  HSTU_BIND(linear)
  HSTU_BIND(linear_backward)
  HSTU_BIND(norm_linear_silu)
  HSTU_BIND(norm_linear_silu_backward)
  HSTU_BIND(norm_gate_linear)
  HSTU_BIND(norm_gate_linear_backward)
  HSTU_BIND(ranker_head)
  HSTU_BIND(layer_norm)
  HSTU_BIND(layer_norm_backward)
  HSTU_BIND(swish_layer_norm)
  HSTU_BIND(swish_layer_norm_backward)
  HSTU_BIND(l2_normalize)
  HSTU_BIND(l2_normalize_backward)
  HSTU_BIND(add)
  HSTU_BIND(mul)
  HSTU_BIND(mul_backward)
  HSTU_BIND(cast)
  HSTU_BIND(dropout)
  HSTU_BIND(embedding)
  HSTU_BIND(embedding_backward)
  HSTU_BIND(embedding_sum)
  HSTU_BIND(position_embedding)
  HSTU_BIND(position_embedding_backward)
  HSTU_BIND(multi_hot_embedding)
  HSTU_BIND(multi_hot_embedding_backward)
  HSTU_BIND(concat)
  HSTU_BIND(split)
  HSTU_BIND(interleave)
  HSTU_BIND(deinterleave)
  HSTU_BIND(jagged_to_dense)
  HSTU_BIND(dense_to_jagged)
  HSTU_BIND(expand)
  HSTU_BIND(expand_backward)
  HSTU_BIND(cumsum)
  HSTU_BIND(sampled_softmax_loss)
  HSTU_BIND(sampled_softmax_loss_backward)
  HSTU_BIND(softmax_loss)
  HSTU_BIND(softmax_loss_backward)
  HSTU_BIND(bce_with_logits_loss)
  HSTU_BIND(bce_with_logits_loss_backward)
  HSTU_BIND(mse_loss)
  HSTU_BIND(mse_loss_backward)
  HSTU_BIND(adamw)
  HSTU_BIND(global_norm_clip)
  HSTU_BIND(rowwise_adagrad)
  HSTU_BIND(hash_lookup)
  HSTU_BIND(top_k)
  HSTU_BIND(target_rank)
  HSTU_BIND(random_ids)
  HSTU_BIND(random_uniform)
  return exports;
}

}  // namespace
}  // namespace hstu

static Napi::Object initialize_module(Napi::Env env, Napi::Object exports) { return hstu::initialize(env, exports); }
NODE_API_MODULE(hstu, initialize_module)
