// The choice of experts from router logits; the same mathematics as select_experts in router/gate.py, which explains it.
// A row costs a microsecond, so one plain version serves every processor. Each row on its own.
#include <math.h>
#include <stdint.h>

#include "thread_pool.h"

struct GateCall {
  const float* logits;  // [num_rows, num_experts]
  const float* bias;    // [num_experts], added for the choice only; may be null
  float* weights;       // [num_rows, top_k]
  int64_t* ids;         // [num_rows, top_k], ascending
  int32_t num_rows, num_experts, top_k;
  int32_t num_groups, top_groups;  // num_groups 0: no limit
  int32_t is_sigmoid, ranks_groups_by_two, is_normalised;
  float scaling_factor;
};

namespace {

constexpr int kMaxExperts = 4096;
constexpr int kRowsPerTask = 32;

// The index of the largest value that is not taken; ties go to the lower one.
int take_largest(const float* values, bool* is_taken, int count) {
  int best = -1;
  for (int i = 0; i < count; i++)
    if (!is_taken[i] && (best < 0 || values[i] > values[best])) best = i;
  is_taken[best] = true;
  return best;
}

void score(const float* logits, int count, bool is_sigmoid, float* scores) {
  if (is_sigmoid) {
    for (int i = 0; i < count; i++) scores[i] = 1.0f / (1.0f + expf(-logits[i]));
    return;
  }
  float largest = logits[0], sum = 0.0f;
  for (int i = 1; i < count; i++) largest = logits[i] > largest ? logits[i] : largest;
  for (int i = 0; i < count; i++) sum += scores[i] = expf(logits[i] - largest);
  for (int i = 0; i < count; i++) scores[i] /= sum;
}

// Marks the experts of all but the best groups as taken.
void leave_out_groups(const GateCall& call, const float* choice, bool* is_taken) {
  const int per_group = call.num_experts / call.num_groups;
  float group_scores[kMaxExperts];
  bool is_kept[kMaxExperts] = {};
  for (int group = 0; group < call.num_groups; group++) {
    const float* members = choice + group * per_group;
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < per_group; i++) {
      if (members[i] > first) {
        second = first;
        first = members[i];
      } else if (members[i] > second) {
        second = members[i];
      }
    }
    group_scores[group] = call.ranks_groups_by_two && per_group > 1 ? first + second : first;
  }
  for (int i = 0; i < call.top_groups; i++) take_largest(group_scores, is_kept, call.num_groups);
  for (int i = 0; i < call.num_experts; i++) is_taken[i] = !is_kept[i / per_group];
}

void select_row(const GateCall& call, int row) {
  float scores[kMaxExperts], choice[kMaxExperts];
  bool is_taken[kMaxExperts] = {}, is_chosen[kMaxExperts] = {};
  score(call.logits + (size_t)row * call.num_experts, call.num_experts, call.is_sigmoid, scores);
  for (int i = 0; i < call.num_experts; i++) choice[i] = call.bias ? scores[i] + call.bias[i] : scores[i];
  if (call.num_groups) leave_out_groups(call, choice, is_taken);
  for (int i = 0; i < call.top_k; i++) is_chosen[take_largest(choice, is_taken, call.num_experts)] = true;
  int64_t* ids = call.ids + (size_t)row * call.top_k;
  float* weights = call.weights + (size_t)row * call.top_k;
  float sum = 0.0f;
  for (int i = 0, k = 0; i < call.num_experts; i++)
    if (is_chosen[i]) {
      ids[k] = i;
      sum += weights[k++] = scores[i];
    }
  const float divisor = call.is_normalised ? sum + 1e-20f : 1.0f;
  for (int i = 0; i < call.top_k; i++) weights[i] = weights[i] / divisor * call.scaling_factor;
}

}  // namespace

void select_experts(const GateCall* call) {
  const int tasks = (call->num_rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(
      tasks,
      [](void* context, int task, int) {
        const GateCall& c = *(const GateCall*)context;
        for (int row = task * kRowsPerTask; row < c.num_rows && row < (task + 1) * kRowsPerTask; row++)
          select_row(c, row);
      },
      (void*)call);
}
