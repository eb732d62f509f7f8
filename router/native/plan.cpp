// Dispatch and combine of a layer's rows, as router/plan.py defines them; a decode step is dozens of layers of a few
// rows each, where numpy's time is the number of its calls.

#include <cstdint>
#include <cstring>
#include <vector>

#include "replicas.h"

namespace {

constexpr int kAbi = 5;  // compiled.py: ABI

struct PlanCall {
  const int64_t* topk_ids;        // [num_tokens, top_k]; -1: left out
  const float* topk_weights;      // [num_tokens, top_k]
  const int64_t* expert_to_unit;  // [num_experts]
  Replicas replicas;
  int32_t* wire;                  // [4 * num_tokens * top_k], message after message: [4, its assignments]
  int64_t* row_ids;               // [num_tokens * top_k], message after message
  int64_t* partial_sums;          // [num_tokens * top_k], message after message
  int64_t* partial_rows;          // [num_tokens * top_k]
  int64_t* message_sizes;         // [ep_size, 3]: assignments, rows, partial sums
  int64_t* tokens_by_ranks;       // [ep_size + 1], zeros
  int64_t* counts;                // [2]: partial sums; the most shards that a row visits, -1 without rows
  int32_t num_tokens, top_k, num_experts, num_units, ep_size;

  int64_t& num_partial_sums() const { return counts[0]; }
  int64_t& max_ranks() const { return counts[1]; }
};

struct PayloadCall {
  const char* hidden_states;   // [num_tokens, row_bytes]
  const int64_t* row_ids;      // [num_rows], which of them; null: the first
  const char* assignments;     // [assignment_bytes]
  char* to;                    // the rows, then the assignments
  int64_t num_rows, row_bytes, assignment_bytes;
};

struct ChoiceCall {
  const int64_t* units;  // [num_rows, top_k]
  Replicas replicas;
  int64_t* ep_ranks;  // [num_rows, top_k], written
  int32_t num_rows, top_k;
};

struct SumAnswer {
  const void* values;           // [num_values, hidden_size], at any address
  const int64_t* partial_sums;  // [num_values]: which partial sum each row is
  int64_t num_values;
};

struct SumCall {
  const int64_t* partial_rows;  // [num_partial_sums]
  float* out;                   // [num_tokens, hidden_size]
  int32_t num_answers, num_partial_sums, num_tokens, hidden_size, is_bfloat16;
};

struct Assignment {
  int32_t row, expert, partial_sum, ep_rank;
  float weight;
};

// What a call needs for itself; kept, because asking for memory costs as much as planning.
struct Scratch {
  std::vector<int32_t> unit_starts, local_rows, num_ranks, next_in_message, next_partial, order;
  std::vector<Assignment> assignments;
  std::vector<RowUnit> row_units;
};

Scratch& scratch() {
  thread_local Scratch kept;
  return kept;
}

// Whether the unit has a shard, and none that does not exist.
bool has_replica(const PlanCall& call, int64_t unit) {
  bool has_any = false;
  for (int r = 0; r < call.replicas.max_replicas; ++r) {
    const int64_t ep_rank = call.replicas.unit_to_ep_ranks[unit * call.replicas.max_replicas + r];
    if (ep_rank >= call.ep_size) return false;
    has_any |= ep_rank >= 0;
  }
  return has_any;
}

// A row has few units, so looking through them is the fastest way to find one.
RowUnit& unit_of_row(Scratch& s, int64_t unit) {
  for (RowUnit& known : s.row_units)
    if (known.unit == unit) return known;
  s.row_units.push_back({unit, 0, -1});
  return s.row_units.back();
}

// The assignments in ascending order of (unit, row, expert): a counting sort by unit of rows in order, each of whose
// experts are put in order first. False for an expert, unit or shard that does not exist.
bool sort_assignments(const PlanCall& call, Scratch& s) {
  const int top_k = call.top_k;
  ReplicaChoice choice(call.replicas);
  const int64_t total = static_cast<int64_t>(call.num_tokens) * top_k;
  s.unit_starts.assign(call.num_units + 1, 0);
  int64_t num_left_out = 0;
  for (int64_t i = 0; i < total; ++i) {
    const int64_t expert = call.topk_ids[i];
    if (expert == -1) {
      ++num_left_out;
      continue;
    }
    if (expert < 0 || expert >= call.num_experts) return false;
    const int64_t unit = call.expert_to_unit[expert];
    if (unit < 0 || unit >= call.num_units) return false;
    if (!has_replica(call, unit)) return false;
    ++s.unit_starts[unit + 1];
  }
  for (int unit = 0; unit < call.num_units; ++unit) s.unit_starts[unit + 1] += s.unit_starts[unit];
  s.assignments.resize(total - num_left_out);
  s.order.resize(top_k);
  for (int row = 0; row < call.num_tokens; ++row) {
    const int64_t* experts = call.topk_ids + static_cast<int64_t>(row) * top_k;
    const float* weights = call.topk_weights + static_cast<int64_t>(row) * top_k;
    int num_experts = 0;
    for (int k = 0; k < top_k; ++k) {
      if (experts[k] == -1) continue;
      int place = num_experts++;
      for (; place > 0 && experts[s.order[place - 1]] > experts[k]; --place) s.order[place] = s.order[place - 1];
      s.order[place] = k;
    }
    s.row_units.clear();
    for (int k = 0; k < num_experts; ++k) ++unit_of_row(s, call.expert_to_unit[experts[s.order[k]]]).num_assignments;
    choice.choose(s.row_units);
    for (int k = 0; k < num_experts; ++k) {
      const int64_t expert = experts[s.order[k]];
      const RowUnit& unit = unit_of_row(s, call.expert_to_unit[expert]);
      s.assignments[s.unit_starts[unit.unit]++] = {row, static_cast<int32_t>(expert), static_cast<int32_t>(unit.unit),
                                                   unit.ep_rank, weights[s.order[k]]};
    }
  }
  return true;
}

// Numbers the (unit, row) pairs and counts what each message has. `partial_sum` is the unit before, the number after.
void number_partial_sums(const PlanCall& call, Scratch& s) {
  int32_t count = 0, unit_before = -1, row_before = -1;
  s.local_rows.assign(static_cast<size_t>(call.ep_size) * call.num_tokens, -1);
  std::memset(call.message_sizes, 0, sizeof(int64_t) * 3 * call.ep_size);
  for (Assignment& a : s.assignments) {
    int64_t* sizes = call.message_sizes + 3 * a.ep_rank;
    ++sizes[0];
    const bool is_next = a.partial_sum != unit_before || a.row != row_before;
    unit_before = a.partial_sum;
    row_before = a.row;
    if (is_next) {
      call.partial_rows[count++] = a.row;
      ++sizes[2];
      int32_t& local = s.local_rows[static_cast<size_t>(a.ep_rank) * call.num_tokens + a.row];
      if (local < 0) {
        local = 0;
        ++sizes[1];
      }
    }
    a.partial_sum = count - 1;
  }
  call.num_partial_sums() = count;
}

// Numbers each message's rows in ascending order, and counts the shards that each row visits.
void number_rows(const PlanCall& call, Scratch& s) {
  s.num_ranks.assign(call.num_tokens, 0);
  int64_t* row_ids = call.row_ids;
  for (int rank = 0; rank < call.ep_size; ++rank) {
    if (call.message_sizes[3 * rank] == 0) continue;
    int32_t* local_rows = s.local_rows.data() + static_cast<size_t>(rank) * call.num_tokens;
    int32_t count = 0;
    for (int row = 0; row < call.num_tokens; ++row) {
      if (local_rows[row] < 0) continue;
      local_rows[row] = count;
      row_ids[count++] = row;
      ++s.num_ranks[row];
    }
    row_ids += count;
  }
  int64_t max_ranks = -1;
  for (int row = 0; row < call.num_tokens; ++row) {
    ++call.tokens_by_ranks[s.num_ranks[row]];
    if (s.num_ranks[row] > max_ranks) max_ranks = s.num_ranks[row];
  }
  call.max_ranks() = max_ranks;
}

void write_messages(const PlanCall& call, Scratch& s) {
  s.next_in_message.assign(2 * call.ep_size, 0);  // where a message's assignments begin, and how many are written
  s.next_partial.assign(2 * call.ep_size, 0);     // the same for its partial sums
  int32_t assignments_start = 0, partial_start = 0;
  for (int rank = 0; rank < call.ep_size; ++rank) {
    s.next_in_message[2 * rank] = assignments_start;
    s.next_partial[2 * rank] = partial_start;
    assignments_start += static_cast<int32_t>(call.message_sizes[3 * rank]);
    partial_start += static_cast<int32_t>(call.message_sizes[3 * rank + 2]);
  }
  for (const Assignment& a : s.assignments) {
    const int64_t length = call.message_sizes[3 * a.ep_rank];
    int32_t* wire = call.wire + 4 * static_cast<int64_t>(s.next_in_message[2 * a.ep_rank]);
    const int32_t place = s.next_in_message[2 * a.ep_rank + 1]++;
    int64_t* partial_sums = call.partial_sums + s.next_partial[2 * a.ep_rank];
    int32_t& num_partial = s.next_partial[2 * a.ep_rank + 1];
    if (num_partial == 0 || partial_sums[num_partial - 1] != a.partial_sum) partial_sums[num_partial++] = a.partial_sum;
    std::memcpy(wire + place, &a.weight, sizeof(float));
    wire[length + place] = s.local_rows[static_cast<size_t>(a.ep_rank) * call.num_tokens + a.row];
    wire[2 * length + place] = a.expert;
    wire[3 * length + place] = num_partial - 1;
  }
}

// total += numbers, which may lie at any address.
void add_row(float* total, const void* numbers, int size, bool is_bfloat16) {
  const char* bytes = static_cast<const char*>(numbers);
  if (is_bfloat16) {
    for (int i = 0; i < size; ++i) {
      uint16_t half;
      std::memcpy(&half, bytes + 2 * static_cast<size_t>(i), sizeof half);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      total[i] += value;
    }
  } else {
    for (int i = 0; i < size; ++i) {
      float value;
      std::memcpy(&value, bytes + 4 * static_cast<size_t>(i), sizeof value);
      total[i] += value;
    }
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int mobula_plan_abi() { return kAbi; }

// Plans a layer; 0 when an expert, unit or shard does not exist.
EXPORT int mobula_plan(const PlanCall* call) {
  Scratch& s = scratch();
  if (!sort_assignments(*call, s)) return 0;
  number_partial_sums(*call, s);
  number_rows(*call, s);
  write_messages(*call, s);
  return 1;
}

// Writes a message's rows and its assignments, as a payload has them.
EXPORT void mobula_write_payload(const PayloadCall* call) {
  const size_t row_bytes = static_cast<size_t>(call->row_bytes);
  char* to = call->to;
  if (call->row_ids == nullptr) {
    std::memcpy(to, call->hidden_states, row_bytes * call->num_rows);
    to += row_bytes * call->num_rows;
  } else {
    for (int64_t i = 0; i < call->num_rows; ++i, to += row_bytes)
      std::memcpy(to, call->hidden_states + row_bytes * call->row_ids[i], row_bytes);
  }
  std::memcpy(to, call->assignments, call->assignment_bytes);
}

// The shard that each row asks for each of its units, as mobula_plan chooses it.
EXPORT void mobula_choose_replicas(const ChoiceCall* call) {
  Scratch& s = scratch();
  ReplicaChoice choice(call->replicas);
  for (int row = 0; row < call->num_rows; ++row) {
    const int64_t* units = call->units + static_cast<int64_t>(row) * call->top_k;
    s.row_units.clear();
    for (int k = 0; k < call->top_k; ++k) ++unit_of_row(s, units[k]).num_assignments;
    choice.choose(s.row_units);
    for (int k = 0; k < call->top_k; ++k)
      call->ep_ranks[static_cast<int64_t>(row) * call->top_k + k] = unit_of_row(s, units[k]).ep_rank;
  }
}

// Adds each row's partial sums in ascending order, from +0.0; 0 when one is missing, or not of the plan.
EXPORT int mobula_sum_partials(const SumCall* call, const SumAnswer* answers) {
  const size_t row_bytes = static_cast<size_t>(call->hidden_size) * (call->is_bfloat16 ? 2 : 4);
  std::vector<const char*> where(call->num_partial_sums, nullptr);
  for (int answer = 0; answer < call->num_answers; ++answer)
    for (int64_t i = 0; i < answers[answer].num_values; ++i) {
      const int64_t p = answers[answer].partial_sums[i];
      if (p < 0 || p >= call->num_partial_sums) return 0;
      where[p] = static_cast<const char*>(answers[answer].values) + i * row_bytes;
    }
  std::vector<int32_t> starts(call->num_tokens + 1, 0), of_rows(call->num_partial_sums);
  for (int p = 0; p < call->num_partial_sums; ++p) {
    if (where[p] == nullptr) return 0;
    ++starts[call->partial_rows[p] + 1];
  }
  for (int row = 0; row < call->num_tokens; ++row) starts[row + 1] += starts[row];
  std::vector<int32_t> next(starts.begin(), starts.end() - 1);
  for (int p = 0; p < call->num_partial_sums; ++p) of_rows[next[call->partial_rows[p]]++] = p;  // ascending in a row
  for (int row = 0; row < call->num_tokens; ++row) {
    float* total = call->out + static_cast<size_t>(row) * call->hidden_size;
    std::memset(total, 0, sizeof(float) * call->hidden_size);
    for (int32_t i = starts[row]; i < starts[row + 1]; ++i)
      add_row(total, where[of_rows[i]], call->hidden_size, call->is_bfloat16 != 0);
  }
  return 1;
}
