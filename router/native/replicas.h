// Which shard a row asks for each of its units, where several hold them: fewest shards for the row first, then the
// shortest expected queue. Any choice gives the same sums (see router/plan.py).
#pragma once

#include <cstdint>
#include <vector>

namespace {

struct Replicas {
  const int64_t* unit_to_ep_ranks;       // [num_units, max_replicas]; -1: none, anywhere
  double* waits;                         // [ep_size], seconds that a forward is expected to wait; grows with the choices
  const double* seconds_per_assignment;  // [ep_size]
  int32_t max_replicas;
};

struct RowUnit {
  int64_t unit;
  int32_t num_assignments, ep_rank;  // ep_rank: -1 until chosen
};

class ReplicaChoice {
 public:
  explicit ReplicaChoice(const Replicas& replicas) : replicas_(replicas) {}

  // Sets the ep_rank of each of a row's units. Every unit has a replica.
  void choose(std::vector<RowUnit>& units) {
    if (replicas_.max_replicas == 1) {
      for (RowUnit& unit : units) unit.ep_rank = static_cast<int32_t>(replicas_.unit_to_ep_ranks[unit.unit]);
      return;
    }
    int num_left = static_cast<int>(units.size());
    for (RowUnit& unit : units)  // where there is no choice
      if (const int32_t only = only_replica(unit.unit); only >= 0) num_left -= take(unit, only);
    for (RowUnit& unit : units)  // shards that the row visits anyway
      if (unit.ep_rank < 0)
        if (const int32_t visited = shortest(unit.unit, units); visited >= 0) num_left -= take(unit, visited);
    while (num_left > 0) {  // the shard that holds most of what is left: fewest shards, for up to three units exactly
      const int32_t best = widest(units);
      for (RowUnit& unit : units)
        if (unit.ep_rank < 0 && holds(best, unit.unit)) num_left -= take(unit, best);
    }
  }

 private:
  const int64_t* replicas_of(int64_t unit) const { return replicas_.unit_to_ep_ranks + unit * replicas_.max_replicas; }

  bool holds(int32_t ep_rank, int64_t unit) const {
    for (int r = 0; r < replicas_.max_replicas; ++r)
      if (replicas_of(unit)[r] == ep_rank) return true;
    return false;
  }

  int32_t only_replica(int64_t unit) const {
    int32_t found = -1;
    for (int r = 0; r < replicas_.max_replicas; ++r) {
      const int64_t ep_rank = replicas_of(unit)[r];
      if (ep_rank < 0) continue;
      if (found >= 0) return -1;
      found = static_cast<int32_t>(ep_rank);
    }
    return found;
  }

  // Of the shards that hold the unit and were chosen for another one; -1 if there is none.
  int32_t shortest(int64_t unit, const std::vector<RowUnit>& units) const {
    int32_t best = -1;
    for (const RowUnit& other : units)
      if (other.ep_rank >= 0 && holds(other.ep_rank, unit) &&
          (best < 0 || replicas_.waits[other.ep_rank] < replicas_.waits[best]))
        best = other.ep_rank;
    return best;
  }

  // Of all shards the one that holds most units not yet chosen for; of equal ones the shortest queue.
  int32_t widest(const std::vector<RowUnit>& units) const {
    int32_t best = -1;
    int best_count = 0;
    for (const RowUnit& unit : units) {
      if (unit.ep_rank >= 0) continue;
      for (int r = 0; r < replicas_.max_replicas; ++r) {
        const int32_t ep_rank = static_cast<int32_t>(replicas_of(unit.unit)[r]);
        if (ep_rank < 0) continue;
        int count = 0;
        for (const RowUnit& other : units) count += other.ep_rank < 0 && holds(ep_rank, other.unit);
        if (count > best_count || (count == best_count && replicas_.waits[ep_rank] < replicas_.waits[best])) {
          best = ep_rank;
          best_count = count;
        }
      }
    }
    return best;
  }

  int take(RowUnit& unit, int32_t ep_rank) {
    unit.ep_rank = ep_rank;
    replicas_.waits[ep_rank] += unit.num_assignments * replicas_.seconds_per_assignment[ep_rank];
    return 1;
  }

  const Replicas& replicas_;
};

}  // namespace
