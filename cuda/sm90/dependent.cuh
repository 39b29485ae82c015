// A kernel that begins while the one before it in the stream still runs (PTX ISA 9.7.13.13, "griddepcontrol"; CUDA's programmatic
// dependent launch).
#pragma once
#include "../common.cuh"

namespace hstu::cuda::sm90 {

// By a kernel: the next one may begin as soon as there is room, if it was launched early.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Returns when the kernel before has ended and what it wrote can be read; at once in one that was not launched early.
__device__ __forceinline__ void await_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// launch() of a kernel that, where `early`, begins when all blocks of the one before have said that it may.
template <typename... P, typename... A>
void launch_early(bool early, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, A&&... arguments) {
  if (shared > 48 * 1024) allow_shared(kernel, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{grid, block, shared, handle_of(stream), &attribute, early ? 1u : 0u};
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, P(std::forward<A>(arguments))...));
}

}  // namespace hstu::cuda::sm90
