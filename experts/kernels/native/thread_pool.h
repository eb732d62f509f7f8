// Threads that share out the tasks of one call at a time. Tasks are taken one by one, so a thread that wakes late or is
// preempted delays nobody; which thread computes a task never changes its result. One caller at a time: api.cpp has the lock.
#pragma once

#include <stddef.h>

typedef void (*Task)(void* context, int task, int thread);

void set_num_threads(int num_threads);
int num_threads();

// Calls task(context, i, thread) for every i < num_tasks, in the caller's thread and the pool's; returns when all have
// returned. `thread` is below num_threads() and tells concurrent tasks apart.
void parallel_for(int num_tasks, Task task, void* context);

// While it lives the pool's threads wait awake for the next parallel_for, which comes within microseconds: a thread that
// sleeps takes 30 us to wake. They give way to whoever else has work for their core.
struct StayAwake {
  StayAwake();
  ~StayAwake();
};

// Memory that a call may use until it returns; `slot` tells the buffers of one call apart. Kept for the next call.
enum ScratchSlot {
  kRowsSlot, kPointersSlot, kHiddenSlot, kHiddenRowsSlot, kHiddenPointersSlot, kSumsSlot, kOrderSlot, kGroupSlot, kPartsSlot,
  kTilesSlot, kProductsSlot, kMlaSlot, kLayerSlot,
  kNumSlots
};
void* scratch(int slot, size_t num_bytes);
void* thread_scratch(int thread, size_t num_bytes);
void* own_scratch(size_t num_bytes);  // of the thread that calls, for one product at a time
