"""A shard looks after its own weights: asks one expert after the other for its known answer, and quarantines units.

A quarantined unit's forwards are refused, so that workers ask a replica, until its weights were read again and answer
as they should. The compute thread checks; the control thread repairs.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from experts.grouped_ffn import ForwardInput
from experts.known_answers import KnownAnswers
from experts.metrics import ShardMetrics
from experts.weight_store import LayerWeights, WeightStore
from protos.errors import UnitQuarantined

logger = logging.getLogger(__name__)


class WrongUnit(NamedTuple):
    """A unit that is not used."""

    layer_id: int
    unit_id: int
    reason: str


class SelfCheck:
    """Of one shard."""

    def __init__(
        self, ep_rank: int, store: WeightStore, known: KnownAnswers, metrics: ShardMetrics, on_wrong: Callable[[], None]
    ) -> None:
        """on_wrong: told in the compute thread that a unit is wrong; must not block."""
        self._ep_rank = ep_rank
        self._store = store
        self._known = known
        self._metrics = metrics
        self._on_wrong = on_wrong
        self._sweep: Iterator[tuple[int, int]] = iter(())  # layers and experts; weights may be released meanwhile
        self._wrong: dict[tuple[int, int], str] = {}  # reasons, by layer and unit

    def wrong_units(self) -> list[WrongUnit]:
        """From any thread."""
        return [WrongUnit(*unit, reason) for unit, reason in sorted(self._wrong.copy().items())]

    def note(self) -> None:
        """Known answers of what was read. The control thread's."""
        for (layer_id, expert_id), expert in self._store.held_experts():
            self._known.note(layer_id, expert_id, expert)

    def check_next(self) -> LayerWeights | None:
        """Asks the next expert; its layer if its unit turned out to be wrong. The compute thread's."""
        following = next(self._sweep, None)
        if following is None:
            self._sweep = iter([(layer.layer_id, expert_id) for layer, expert_id in self._experts()])
            following = next(self._sweep, None)
        if following is None:
            return None
        layer_id, expert_id = following
        layer = self._store.newest_layer(layer_id)
        if layer is None or layer.expert_to_unit[expert_id] < 0:  # it has gone since the sweep began
            return None
        unit = (layer_id, int(layer.expert_to_unit[expert_id]))
        self._metrics.num_self_checks += 1
        if unit in self._wrong or (fault := self._known.fault(layer, expert_id)) is None:
            return None
        self._wrong[unit] = fault
        self._metrics.num_wrong_units = len(self._wrong)
        logger.error("unit %d of layer %d is quarantined: %s", unit[1], unit[0], fault)
        self._on_wrong()
        return layer

    def refuse_wrong(self, layer: LayerWeights, forward: ForwardInput) -> None:
        """Raises UnitQuarantined for a forward that asks for a wrong unit."""
        if not self._wrong:
            return
        units = np.unique(layer.expert_to_unit[forward.expert_ids]).tolist()
        wrong = tuple(unit_id for unit_id in units if (layer.layer_id, unit_id) in self._wrong)
        if wrong:
            raise UnitQuarantined(
                f"units {list(wrong)} of layer {layer.layer_id} on shard {self._ep_rank} do not give their known "
                f"answers: {self._wrong.get((layer.layer_id, wrong[0]), 'read again just now')}",
                unit_ids=wrong,
            )

    def repair(self) -> None:
        """Reads wrong units again; those that answer as they should are used again. The control thread's."""
        for unit in list(self._wrong):
            faults = [
                fault
                for layer, expert_ids in self._store.read_again(*unit)
                for expert_id in expert_ids
                if (fault := self._known.fault(layer, expert_id)) is not None
            ]
            if faults:
                self._wrong[unit] = f"{faults[0]}, and does so after it was read again"
                logger.error("unit %d of layer %d stays quarantined: %s", unit[1], unit[0], faults[0])
            else:
                del self._wrong[unit]
                self._metrics.num_repaired_units += 1
                logger.warning("unit %d of layer %d was read again and is right", unit[1], unit[0])
        self._metrics.num_wrong_units = len(self._wrong)

    def read_again(self, experts: Iterable[tuple[int, int]]) -> None:
        """Believes the checkpoint rather than what it gave before. experts: by layer and id. The control thread's."""
        asked = set(experts)
        units = {
            (layer.layer_id, int(layer.expert_to_unit[expert_id]))
            for layer, expert_id in self._experts()
            if (layer.layer_id, expert_id) in asked
        }
        for layer_id, unit_id in sorted(units):
            before = self.answers()
            renewed = self._store.read_again(layer_id, unit_id)
            for expert_id in sorted({expert_id for _, expert_ids in renewed for expert_id in expert_ids}):
                self._known.forget(layer_id, expert_id)
            self.note()
            changed = sorted(set(self.answers().items()) - set(before.items()))
            logger.warning("unit %d of layer %d was read again: %d answers changed", unit_id, layer_id, len(changed))

    def answers(self) -> dict[tuple[int, int], int]:
        """Known answers of all experts held, by (layer_id, expert_id). From any thread."""
        return self._known.of(key for key, _ in self._store.held_experts())

    def _experts(self) -> Iterator[tuple[LayerWeights, int]]:
        """Those of the newest placement served, once."""
        versions = self._store.versions
        if not versions:
            return
        for layer in self._store.layers(versions[-1]):
            for expert_id in np.flatnonzero(layer.expert_to_unit >= 0).tolist():
                yield layer, expert_id
