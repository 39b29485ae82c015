#include "threads.h"

#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "../check.h"
#include "../memory.h"

namespace hstu::cpu {
namespace {

// Leaked on purpose: process.exit() runs static destructors while workers may still be parked here.
struct Pool {
  std::mutex owner;              // held by the caller whose tasks run
  std::vector<std::thread> workers;
  std::atomic<uint32_t> epoch{0};  // raised for each batch of tasks; workers wait on it
  std::atomic<int> running{0};
  std::atomic<int64_t> next{0};
  int64_t count = 0;
  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;
  std::mutex failure_mutex;
  std::exception_ptr failure;
  std::atomic<int> wanted{0};   // threads that take part, the caller included
  int serving = 0;  // workers that take part in the current batch
};

Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

constexpr int kMaxThreads = 1024;
thread_local bool inside_task = false;

int default_threads() {
  if (const char* text = std::getenv("HSTU_NUM_THREADS"); text && *text) {
    char* end = nullptr;
    long count = std::strtol(text, &end, 10);
    HSTU_CHECK(*end == 0 && count >= 1 && count <= kMaxThreads, kInvalidArgument, "HSTU_NUM_THREADS must be an integer from 1 to ",
               kMaxThreads, ", got '", text, "'");
    return int(count);
  }
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
  unsigned count = std::thread::hardware_concurrency();
  return count ? int(count) : 1;
}

void drain(Pool& p) {
  inside_task = true;
  for (int64_t i; (i = p.next.fetch_add(1, std::memory_order_relaxed)) < p.count;) {
    try {
      p.task(p.context, i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(p.failure_mutex);
      if (!p.failure) p.failure = std::current_exception();
      p.next.store(p.count, std::memory_order_relaxed);
    }
  }
  inside_task = false;
}

void work(Pool& p, int index, uint32_t seen) {
  for (;;) {
    for (int spin = 0; spin < 2000 && p.epoch.load(std::memory_order_acquire) == seen; ++spin) __builtin_ia32_pause();
    p.epoch.wait(seen, std::memory_order_acquire);
    seen = p.epoch.load(std::memory_order_acquire);
    if (index < p.serving) drain(p);
    p.running.fetch_sub(1, std::memory_order_release);
    p.running.notify_one();
  }
}

}  // namespace

int num_threads() {
  Pool& p = pool();
  int wanted = p.wanted.load(std::memory_order_relaxed);
  if (wanted == 0) p.wanted.store(wanted = default_threads(), std::memory_order_relaxed);
  return wanted;
}

void set_num_threads(int count) {
  std::lock_guard<std::mutex> lock(pool().owner);
  pool().wanted = count > 0 ? count : default_threads();
}

const char* instruction_set() {
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
  return "sse2";
}

void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context) {
  Pool& p = pool();
  int threads = num_threads();
  std::unique_lock<std::mutex> lock(p.owner, std::defer_lock);
  if (count <= 1 || threads == 1 || inside_task || !lock.try_lock()) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  try {
    while (int(p.workers.size()) < threads - 1) {
      int index = int(p.workers.size());
      uint32_t seen = p.epoch.load(std::memory_order_relaxed);
      p.workers.emplace_back([&p, index, seen] { work(p, index, seen); });
      p.workers.back().detach();
    }
  } catch (const std::system_error&) {  // the system gives no more threads: go on with those there are
    threads = int(p.workers.size()) + 1;
    p.wanted.store(threads, std::memory_order_relaxed);
  }
  p.count = count, p.task = task, p.context = context, p.failure = nullptr;
  p.serving = threads - 1;
  p.next.store(0, std::memory_order_relaxed);
  p.running.store(int(p.workers.size()), std::memory_order_relaxed);
  p.epoch.fetch_add(1, std::memory_order_release);
  p.epoch.notify_all();
  drain(p);
  for (int left; (left = p.running.load(std::memory_order_acquire)) != 0;) p.running.wait(left, std::memory_order_acquire);
  if (p.failure) std::rethrow_exception(p.failure);
}

}  // namespace hstu::cpu
