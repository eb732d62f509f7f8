#include "thread_pool.h"

#include <sched.h>
#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int kMaxThreads = 256;
constexpr int kSpins = 400;  // about 10 us: back-to-back calls do not pay a wake-up, idle threads sleep
constexpr int kHeldSpins = 20 * kSpins, kSpinsPerYield = 64;  // within a StayAwake

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  void* at_least(size_t num_bytes) {
    if (num_bytes > size) {
      free(data);
      size = (num_bytes + num_bytes / 4 + 4095) & ~size_t(4095);
      data = aligned_alloc(4096, size);
      if (!data) abort();
    }
    return data;
  }
};

struct Pool {
  std::mutex mutex;
  std::condition_variable work, idle;
  std::vector<std::thread> threads;
  std::atomic<unsigned> epoch{0};
  std::atomic<int> next{0}, active{0};
  std::atomic<bool> stays_awake{false};
  bool is_open = false, is_stopping = false;
  Task task = nullptr;
  void* context = nullptr;
  int num_tasks = 0;
  Buffer buffers[kNumSlots];
  Buffer thread_buffers[kMaxThreads];

  void run(int thread) {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(context, i, thread);
  }

  // Until there is work, or it is time to sleep.
  void spin(unsigned seen) const {
    for (int i = 0; epoch.load(std::memory_order_acquire) == seen; i++) {
      if (i >= kSpins) {
        if (i >= kHeldSpins || !stays_awake.load(std::memory_order_relaxed)) return;
        if (i % kSpinsPerYield == 0) sched_yield();  // another process may have work for this core
      }
      relax();
    }
  }

  void work_until_stopped(int thread) {
    unsigned seen = 0;
    for (;;) {
      spin(seen);
      {
        std::unique_lock<std::mutex> lock(mutex);
        work.wait(lock, [&] { return is_stopping || epoch.load() != seen; });
        if (is_stopping) return;
        seen = epoch.load();
        if (!is_open) continue;
        active.fetch_add(1);
      }
      run(thread);
      if (active.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex);
        idle.notify_one();
      }
    }
  }

  void resize(int count) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      is_stopping = true;
    }
    work.notify_all();
    for (auto& thread : threads) thread.join();
    threads.clear();
    is_stopping = false;
    try {
      for (int i = 1; i < count; i++) threads.emplace_back([this, i] { work_until_stopped(i); });
    } catch (const std::system_error&) {  // a limit on processes; those that were started do the work
    }
  }
};

Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: its threads may outlive static destructors
  return *instance;
}

}  // namespace

void set_num_threads(int num_threads) {
  pool().resize(num_threads < 1 ? 1 : num_threads > kMaxThreads ? kMaxThreads : num_threads);
}

int num_threads() { return (int)pool().threads.size() + 1; }

void parallel_for(int num_tasks, Task task, void* context) {
  Pool& p = pool();
  if (num_tasks <= 1 || p.threads.empty()) {
    for (int i = 0; i < num_tasks; i++) task(context, i, 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    p.task = task;
    p.context = context;
    p.num_tasks = num_tasks;
    p.next.store(0, std::memory_order_relaxed);
    p.is_open = true;
    p.epoch.fetch_add(1, std::memory_order_release);
  }
  p.work.notify_all();
  p.run(0);
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    p.is_open = false;  // whoever wakes from here on has nothing to do
  }
  for (int i = 0; i < kSpins && p.active.load(std::memory_order_acquire); i++) relax();
  if (p.active.load(std::memory_order_acquire)) {
    std::unique_lock<std::mutex> lock(p.mutex);
    p.idle.wait(lock, [&] { return p.active.load() == 0; });
  }
}

StayAwake::StayAwake() { pool().stays_awake.store(true, std::memory_order_relaxed); }
StayAwake::~StayAwake() { pool().stays_awake.store(false, std::memory_order_relaxed); }

void* scratch(int slot, size_t num_bytes) { return pool().buffers[slot].at_least(num_bytes); }
void* thread_scratch(int thread, size_t num_bytes) { return pool().thread_buffers[thread].at_least(num_bytes); }

void* own_scratch(size_t num_bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(num_bytes);
}
