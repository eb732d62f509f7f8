"""What a step is expected to take, from counts alone. A model to compare placements with, not a prediction.

One step of one worker goes through the mixture layers one after the other. In each of them

    layer_s = max over shards of (assignments / speed) * assignment_s     the hottest shard computes
            + messages * message_s                                        the worker sends and takes one for each shard
            + (sent + received bytes) / bytes_per_s                       all rows pass the worker's own link

and step_s is the sum over the layers: how long a step takes when no other is under way. With `steps_in_flight` n, the
shard that is busiest over all layers must compute for n steps in the time of one, so a step takes at least n times
what that shard computes for it:

    step_s = max(sum over layers of layer_s,
                 n * max over shards of the sum over layers of (assignments / speed) * assignment_s)

(the bound of a closed queueing network: Denning and Buzen 1978, operational analysis). Attention, shared experts,
reading weights and waiting by chance are left out: they are alike for every placement, or nearly so.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.trace.model_shape import ModelShape
from router.trace.trace import TraceError

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What things cost. The defaults are of one present-day accelerator a shard, 200 Gb/s to each worker, and messages
    through shared memory or a stream without copies."""

    flops_per_s: float = 200e12  # of a shard of speed 1.0, in grouped products of a step's size
    message_s: float = 10e-6  # of the worker's time, for each shard it asks, with the answer
    bytes_per_s: float = 25e9  # of the worker's link
    steps_in_flight: int = 1  # micro-batches of all workers together that are under way at a time

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TraceError(f"{name} is {getattr(self, name)}, must be more than 0 and finite")
        if not 0 <= self.message_s < float("inf"):
            raise TraceError(f"message_s is {self.message_s}, must be 0 or more and finite")
        if not 1 <= self.steps_in_flight <= 65536:
            raise TraceError(f"steps_in_flight is {self.steps_in_flight}, must be 1 to 65536")

    def step_s(
        self,
        model: ModelShape,
        assignments: npt.NDArray[np.integer],
        num_messages: npt.NDArray[np.integer],
        num_bytes: npt.NDArray[np.integer],
        speeds: Float64Array | None = None,
    ) -> float:
        """Seconds of one step.

        assignments: [num_moe_layers, ep_size], (row, expert) pairs of each shard; num_messages, num_bytes:
        [num_moe_layers], both ways together; speeds: [ep_size], relative; None: all 1.0.
        """
        assignment_s = 2 * model.expert_parameters / self.flops_per_s
        computing_s = assignments * assignment_s / (1.0 if speeds is None else speeds)  # [num_moe_layers, ep_size]
        layers_s = computing_s.max(axis=1) + num_messages * self.message_s + num_bytes / self.bytes_per_s
        busiest_s = computing_s.sum(axis=0).max()
        return float(max(layers_s.sum(), self.steps_in_flight * busiest_s))
