"""Collects what the page shows. The page asks once a second; answers are shared between all that are open, and while
none is, only the log is kept.

What cannot be had just now (a shard restarts, the controller is gone) is missing from the answer; `errors` says why.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.controller.admin_messages import cluster_status
from cluster.controller.process import ClusterStatus
from cluster.dashboard.event_log import EventLog
from cluster.dashboard.metrics_summary import summarize
from cluster.dashboard.state import load_fields, model_fields, placement_fields, status_fields
from cluster.gateway.local_calls import LocalCallFailed, LocalCalls
from protos import admin_pb2, generation_pb2
from protos.loop_thread import LoopEnded, LoopThread

logger = logging.getLogger(__name__)

MAX_AGE_S = 0.5  # of an answer that several pages share
MAX_WAIT_S = 1.0  # of a page for what another one collects; then it gets what was known before
LOG_INTERVAL_S = 2.0  # between two looks at the status for the log
TIMEOUT_S = 8.0  # above that of a shard's answer about its load
INFERENCE = "mobula.v1.Inference"


class Dashboard:
    """Used from the HTTP server's threads; its calls run on the gateway's loop."""

    def __init__(self, calls: LocalCalls, loop: LoopThread, pages: Callable[[], list[str]]) -> None:
        """pages: the processes' metrics, as text."""
        self._calls = calls
        self._loop = loop
        self._pages = pages
        self._log = EventLog()
        self._collecting = threading.Lock()  # held as long as processes take to answer
        self._lock = threading.Lock()  # of all below, and of the log; held for moments
        self._collected_s = float("-inf")
        self._state: dict[str, Any] = {}
        self._placement: dict[str, Any] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_log, name="dashboard-log", daemon=True)

    def start(self) -> None:
        """Begins the log."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the log. Safe to call twice."""
        self._stopping.set()

    def state(self, known_placement_version: int, last_event: int) -> dict[str, Any]:
        """Everything, but of the placement and the log only what the page lacks.

        Who asks while another page's answer takes long gets the one before; for the first one it waits.
        """
        max_wait_s = MAX_WAIT_S if self._state else -1.0
        if time.monotonic() - self._collected_s > MAX_AGE_S and self._collecting.acquire(timeout=max_wait_s):
            try:
                self._collect_unless_fresh()
            finally:
                self._collecting.release()
        with self._lock:
            state = self._state | {"events": self._log.after(last_event)}
            if self._placement and self._placement["placement_version"] != known_placement_version:
                state["placement"] = self._placement
        return state

    def _collect_unless_fresh(self) -> None:
        if time.monotonic() - self._collected_s > MAX_AGE_S:
            collected = self._collect()
            with self._lock:
                self._state, self._collected_s = collected, time.monotonic()

    def _collect(self) -> dict[str, Any]:
        state = self._loop.run(self._ask(), 2 * TIMEOUT_S)
        state["metrics"] = summarize(self._pages())
        state["time_s"] = time.time()
        return state

    async def _ask(self) -> dict[str, Any]:
        answers = await asyncio.gather(self._load(), self._model(), self._status(), return_exceptions=True)
        state: dict[str, Any] = {"errors": {}}
        for name, answer in zip(("load", "model", "status"), answers, strict=True):
            if isinstance(answer, LocalCallFailed | TimeoutError):
                state["errors"][name] = str(answer) or f"no answer within {TIMEOUT_S:.0f} s"
            elif isinstance(answer, BaseException):
                raise answer
            else:
                state[name] = answer
        return state

    async def _load(self) -> dict[str, Any]:
        request, response = generation_pb2.GetExpertLoadRequest(), generation_pb2.GetExpertLoadResponse
        load = await asyncio.wait_for(self._calls.call(f"{INFERENCE}/GetExpertLoad", request, response), TIMEOUT_S)
        if self._placement is None or self._placement["placement_version"] != load.placement_version:
            asked, answer = generation_pb2.GetPlacementRequest(), generation_pb2.GetPlacementResponse
            placement = await asyncio.wait_for(self._calls.call(f"{INFERENCE}/GetPlacement", asked, answer), TIMEOUT_S)
            self._placement = placement_fields(placement)
        return load_fields(load)

    async def _model(self) -> dict[str, Any]:
        request, response = generation_pb2.GetModelInfoRequest(), generation_pb2.GetModelInfoResponse
        info = await asyncio.wait_for(self._calls.call(f"{INFERENCE}/GetModelInfo", request, response), TIMEOUT_S)
        return model_fields(info)

    async def _status(self) -> dict[str, Any]:
        return status_fields(await self._cluster_status())

    async def _cluster_status(self) -> ClusterStatus:
        request, response = admin_pb2.GetStatusRequest(), admin_pb2.GetStatusResponse
        call = self._calls.call("mobula.v1.Admin/GetStatus", request, response)
        return cluster_status(await asyncio.wait_for(call, TIMEOUT_S))

    def _keep_log(self) -> None:
        while not self._stopping.wait(LOG_INTERVAL_S):
            try:
                status = self._loop.run(self._cluster_status(), 2 * TIMEOUT_S)
            except (LocalCallFailed, TimeoutError, LoopEnded) as error:
                logger.debug("no status for the log: %s", error)
                continue
            except Exception:  # the loop's top: one failed look must not end the log
                logger.exception("no status for the log")
                continue
            with self._lock:
                self._log.observe(status, time.time())
