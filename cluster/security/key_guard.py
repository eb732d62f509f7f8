"""Lets calls of the gateway's clients through when they show a key with the right for it.

A key travels in the metadata `authorization: Bearer ID.SECRET`. Who a caller is, handlers find in caller.py; of a key
only its id is ever logged, counted or told.
"""

from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from cluster.security.caller import Caller, current_caller, set_caller
from cluster.security.keys import Clock, Key, KeyRing, Right, utc_now
from cluster.security.metrics import KeyMetrics, Refusal
from protos import admin_pb2, generation_pb2
from protos.errors import MobulaError, PermissionDenied, Unauthenticated
from protos.guard import HEALTH_PREFIX

AUTHORIZATION = "authorization"
SCHEME = "bearer "
RIGHTS = {
    generation_pb2.DESCRIPTOR.services_by_name["Inference"].full_name: Right.GENERATE,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name: Right.ADMIN,
    reflection.SERVICE_NAME: Right.REFLECTION,
}


class KeyCheck:
    """A check for protos.guard.Guard: raises Unauthenticated or PermissionDenied."""

    def __init__(self, ring: KeyRing, metrics: KeyMetrics, now: Clock = utc_now) -> None:
        self._ring = ring
        self._metrics = metrics
        self._now = now

    def __call__(self, method: str, context: grpc.aio.ServicerContext) -> None:
        if method.startswith(HEALTH_PREFIX):
            return
        service = method[1:].rpartition("/")[0]
        shown = [str(value) for name, value in context.invocation_metadata() or () if name == AUTHORIZATION]
        key = self.require(shown, RIGHTS.get(service))
        if current_caller().key_id == key.id:
            return  # a stream is checked again
        self._metrics.count(key.id)
        set_caller(Caller(key_id=key.id, max_concurrent_requests=key.max_concurrent_requests))

    def require(self, shown: Sequence[str], right: Right | None) -> Key:
        """The key of a caller that shows these `authorization` values, if it has the right.

        Raises Unauthenticated, PermissionDenied.
        """
        key = self._identify(shown)
        if right not in key.rights:
            raise self._refused(
                Refusal.RIGHT, PermissionDenied(f"key {key.id} has not the right that this needs: {right}")
            )
        return key

    def _identify(self, shown: Sequence[str]) -> Key:
        if not shown:
            way = f"send it in the metadata: {AUTHORIZATION}: Bearer KEY; on the command line: --api-key-file FILE"
            raise self._refused(Refusal.MISSING, Unauthenticated(f"no key; {way}"))
        is_bearer = len(shown) == 1 and shown[0][: len(SCHEME)].lower() == SCHEME
        key = self._ring.find(shown[0][len(SCHEME) :].strip()) if is_bearer else None
        if key is None:
            raise self._refused(Refusal.UNKNOWN, Unauthenticated("the key is not known here"))
        if key.is_revoked:
            raise self._refused(Refusal.REVOKED, Unauthenticated(f"key {key.id} is revoked"))
        if key.is_expired(self._now()):
            raise self._refused(Refusal.EXPIRED, Unauthenticated(f"key {key.id} expired at {key.expires}"))
        return key

    def _refused(self, why: Refusal, error: MobulaError) -> MobulaError:
        self._metrics.count_refusal(why)
        return error
