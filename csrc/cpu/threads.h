// The CPU backend's thread pool. parallel_for splits [0, count) into single tasks that threads take in turn; what a task computes
// must not depend on which thread runs it, so results do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <type_traits>

// Functions compiled three times and chosen when the addon loads. Lambdas inside are not cloned: keep them to plain calls.
#define HSTU_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace hstu::cpu {

int num_threads();
void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context);

// body(task) for every task in [0, count). Nested calls, and calls while another environment's op runs, execute in the caller.
template <typename Body>
void parallel_for(int64_t count, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run_tasks(
      count, [](void* context, int64_t task) { (*static_cast<Plain*>(context))(task); },
      const_cast<std::remove_const_t<Plain>*>(&body));
}

// body(begin, end) over [0, count) in fixed blocks of `grain`, whatever the number of threads.
template <typename Body>
void parallel_blocks(int64_t count, int64_t grain, Body&& body) {
  parallel_for((count + grain - 1) / grain, [&](int64_t block) {
    int64_t begin = block * grain, end = begin + grain < count ? begin + grain : count;
    body(begin, end);
  });
}

}  // namespace hstu::cpu
