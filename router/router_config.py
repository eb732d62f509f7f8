"""The router's settings, apart from what computes with them: who only reads a configuration needs no torch."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, Field

MAX_SECONDS = 366 * 86400  # of any time that is configured: as good as for ever, and no clock overflows
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]


class CapacityPolicy(StrEnum):
    """Who is served where an expert or a device is asked for more than it may take; capacity.py defines them."""

    DROPLESS = "dropless"
    SWITCH = "switch"
    GSHARD = "gshard"
    DEVICE_DROP = "device_drop"


class MissingExperts(StrEnum):
    """What a layer does about experts whose shards, replicas too, cannot be reached."""

    WAIT = "wait"  # up to forward_timeout_s; then the step's requests end with UNAVAILABLE
    LEAVE_OUT = "leave_out"  # their share of the sum is 0
    RENORMALISE = "renormalise"  # the others get their weight


class RouterConfig(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """How long the router waits for shards, and whether it spares them work under overload."""

    forward_timeout_s: PositiveSeconds = 120.0  # per layer, retries included; covers a shard's restart
    attempt_timeout_s: PositiveSeconds = 20.0  # without an answer for so long, ask again or elsewhere
    late_after_s: PositiveSeconds = (
        0.05  # no answer is late sooner; when it is follows from measured times, and then replicas are asked too
    )

    # Degraded mode, for steps all of whose requests have set allow_missing_experts. Their usage says so.
    missing_experts: MissingExperts = Field(default=MissingExperts.WAIT, strict=False)
    missing_after_s: Seconds = 2.0  # that a layer waits before it does without; the next ones do not wait again

    shared_memory_mib: Annotated[int, Field(ge=0, le=65536)] = (
        256  # with each shard of this host; used as needed; 0: none
    )

    # The overload valve. "dropless" computes every assignment. Any other policy leaves some out, in each layer of each
    # micro-batch for itself: answers get worse, and depend on what else is in a step; each says how many it lacks.
    capacity_policy: CapacityPolicy = Field(default=CapacityPolicy.DROPLESS, strict=False)
    capacity_factor: Annotated[float, Field(gt=0, le=1024)] = 1.25  # times an even share of the assignments
    min_capacity: Annotated[int, Field(ge=1)] = 8  # assignments always taken: a step of a few rows overloads nobody
