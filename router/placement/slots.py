"""Repairs a placement of single experts in slots: no two replicas of one on a shard, and on several domains."""

import numpy as np

from router.expert_map import Int64Array
from router.placement.request import Float64Array, PlacementDoesNotFit


def spread_replicas(slots: Int64Array, share: Float64Array, domains: Int64Array, min_domains: int) -> Int64Array:
    """Exchanges replicas between shards within a layer until none is where it may not be.

    Each shard keeps as many. Of the exchanges that mend a fault and make none, the one after which the busier of the
    two shards has least to do is taken; where there is none, the layer is dealt anew without an eye on load.
    slots: [num_layers, ep_size, per_shard], the expert in each slot; share: [num_layers, num_experts], the load of one
    replica; domains: [ep_size] from 0; min_domains: that an expert's replicas must lie in.
    Returns slots of the same shape. Raises PlacementDoesNotFit.
    """
    mended = slots.copy()
    for layer in range(len(slots)):
        table = _Layer(mended[layer], share[layer], domains, min_domains)
        while (fault := table.first_fault()) is not None:
            if not table.mend(*fault):
                mended[layer] = _dealt(mended[layer], domains, min_domains)
                break
    return mended


class _Layer:
    """One layer's slots, changed in place. counts: [num_experts, ep_size], replicas on each shard."""

    def __init__(self, slots: Int64Array, share: Float64Array, domains: Int64Array, min_domains: int) -> None:
        self.slots, self.share, self.domains, self.min_domains = slots, share, domains, min_domains
        self.counts = np.zeros((len(share), len(slots)), dtype=np.int64)
        np.add.at(self.counts, (slots, np.arange(len(slots))[:, None]), 1)
        self.by_domain = np.zeros((len(share), int(domains.max()) + 1), dtype=np.int64)
        np.add.at(self.by_domain, (slots, domains[:, None]), 1)
        self.load = share[slots].sum(axis=1)  # [ep_size]

    def first_fault(self) -> tuple[int, int] | None:
        """The shard and slot of a replica that must go elsewhere."""
        experts, shards = np.nonzero(self.counts > 1)
        if len(experts):
            expert, shard = int(experts[0]), int(shards[0])
        else:
            few = np.flatnonzero((self.by_domain > 0).sum(axis=1) < self.min_domains)
            if not len(few):
                return None
            expert = int(few[0])
            shard = int(np.flatnonzero(self.counts[expert])[-1])
        return shard, int(np.flatnonzero(self.slots[shard] == expert)[-1])

    def mend(self, shard: int, slot: int) -> bool:
        """Exchanges that replica with the best of another shard; False if there is none that may be."""
        expert = int(self.slots[shard, slot])
        others = self.slots  # [ep_size, per_shard], each what would come here
        can = (self.counts[expert] == 0)[:, None] & (self.counts[others, shard] == 0)
        can &= self._domains_after(others, self.domains[:, None], self.domains[shard]) >= np.minimum(
            self.min_domains, (self.by_domain[others] > 0).sum(axis=-1)
        )
        if self.counts[expert, shard] == 1:  # it is the domain that is wrong
            can &= (self.by_domain[expert][self.domains] == 0)[:, None]
        else:
            after = self._domains_after(np.full(len(self.slots), expert), self.domains[shard], self.domains)
            can &= (after >= min(self.min_domains, int((self.by_domain[expert] > 0).sum())))[:, None]
        if not can.any():
            return False
        moved = self.share[expert] - self.share[others]
        busier = np.maximum(self.load[shard] - moved, self.load[:, None] + moved)
        other_shard, other_slot = np.unravel_index(np.where(can, busier, np.inf).argmin(), can.shape)
        self._exchange(shard, slot, int(other_shard), int(other_slot))
        return True

    def _domains_after(self, experts: Int64Array, left: Int64Array, entered: Int64Array) -> Int64Array:
        """In how many domains experts lie once a replica of each went from one to another."""
        counts = self.by_domain[experts]
        num_domains = (counts > 0).sum(axis=-1)
        left, entered = np.broadcast_to(left, experts.shape), np.broadcast_to(entered, experts.shape)
        closes = np.take_along_axis(counts, left[..., None], axis=-1)[..., 0] == 1
        opens = np.take_along_axis(counts, entered[..., None], axis=-1)[..., 0] == 0
        return np.asarray(np.where(left == entered, num_domains, num_domains - closes + opens))

    def _exchange(self, shard: int, slot: int, other_shard: int, other_slot: int) -> None:
        expert, other = int(self.slots[shard, slot]), int(self.slots[other_shard, other_slot])
        for moving, origin, target in ((expert, shard, other_shard), (other, other_shard, shard)):
            self.counts[moving, origin] -= 1
            self.counts[moving, target] += 1
            self.by_domain[moving, self.domains[origin]] -= 1
            self.by_domain[moving, self.domains[target]] += 1
            self.load[origin] -= self.share[moving]
            self.load[target] += self.share[moving]
        self.slots[shard, slot], self.slots[other_shard, other_slot] = other, expert


def _dealt(slots: Int64Array, domains: Int64Array, min_domains: int) -> Int64Array:
    """The same experts, dealt out to the shards with most room; the first two replicas to the domains with most."""
    ep_size, per_shard = slots.shape
    dealt, room = np.full_like(slots, -1), np.full(ep_size, per_shard)
    counts = np.bincount(slots.ravel())
    for expert in np.argsort(-counts, kind="stable").tolist():
        holds = np.zeros(ep_size, dtype=np.bool_)
        for _ in range(int(counts[expert])):
            is_opened = np.isin(domains, domains[holds])
            can = (room > 0) & ~holds
            score = room.astype(np.float64)
            if len(np.unique(domains[holds])) < min_domains:
                can &= ~is_opened
                score += np.bincount(domains, weights=room)[domains] * (per_shard + 1)
            if not can.any():
                raise PlacementDoesNotFit(
                    f"no shard can take another replica of expert {expert}: {counts[expert]} replicas must be on as "
                    f"many shards and in {min_domains} failure domains of sizes {np.bincount(domains).tolist()}, each "
                    f"shard holding {per_shard} experts of a layer; use more even domains or fewer replicas"
                )
            shard = int(np.where(can, score, -1).argmax())
            dealt[shard, per_shard - room[shard]] = expert
            holds[shard] = True
            room[shard] -= 1
    return dealt
