// Whether a forward's assignments are what a shard may compute: indices in range, experts held, (unit, row, expert)
// ascending, partial sums numbering the (unit, row) pairs from 0.
#include <stdint.h>

struct AssignmentsCheck {
  const int64_t* expert_to_unit;  // [num_experts], -1: not held
  int32_t num_assignments, num_experts, num_rows, num_partial_sums;
};

// assignments: [4, num_assignments]: weights, rows, expert ids, partial sums.
extern "C" __attribute__((visibility("default"))) int mobula_accepts_assignments(const AssignmentsCheck* check,
                                                                                 const int32_t* assignments) {
  const int32_t length = check->num_assignments;
  const int32_t* rows = assignments + static_cast<int64_t>(length);
  const int32_t* expert_ids = rows + length;
  const int32_t* partial_sums = expert_ids + length;
  int64_t unit_before = -1;
  int32_t row_before = -1, expert_before = -1, num_pairs = 0;
  for (int32_t i = 0; i < length; ++i) {
    const int32_t row = rows[i], expert = expert_ids[i];
    if (row < 0 || row >= check->num_rows || expert < 0 || expert >= check->num_experts) return 0;
    const int64_t unit = check->expert_to_unit[expert];
    if (unit < 0) return 0;
    if (unit == unit_before && row == row_before) {
      if (expert <= expert_before) return 0;
    } else {
      if (unit < unit_before || (unit == unit_before && row < row_before)) return 0;
      ++num_pairs;
    }
    if (partial_sums[i] != num_pairs - 1) return 0;
    unit_before = unit;
    row_before = row;
    expert_before = expert;
  }
  return num_pairs == check->num_partial_sums;
}
