"""A running Mobula: checks everything that can be checked, starts Ray and the controller, waits, and stops it all.

with Deployment(config) as deployment:
    deployment.wait_until_serving(show)
    ...  # deployment.address answers gRPC calls
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray

from cluster.config import ConfigError, MobulaConfig
from cluster.controller.controller import StartError
from cluster.controller.process import ClusterStatus, ProcessHealth, RoleName
from cluster.roles.actors import booked_cpus, create_controller, end_everything
from cluster.roles.local_ray import end_local_ray, start_local_ray
from cluster.roles.preflight import ServingPlan, check, memory_budget
from cluster.roles.ray_address import check_answers

logger = logging.getLogger(__name__)

POLL_S = 0.1
STATUS_TIMEOUT_S = 60.0  # the controller answers at once; a machine that starts ten processes may not
LOOPBACK = "127.0.0.1"


class Deployment:
    """One Mobula on one Ray cluster. Leaving the `with` block ends every process that it started."""

    def __init__(self, config: MobulaConfig) -> None:
        """Checks the configuration against the checkpoint and the machine.

        Raises ConfigError, InvalidCheckpoint, UnsupportedModel or PlacementError before anything is started.
        """
        self.config = config
        self.plan: ServingPlan = check(config)
        self._memory_budget = memory_budget(config, self.plan)
        if config.ray.address is None:
            _check_port(config.gateway.host, config.gateway.port, "gateway.port")
            _check_port(config.gateway.host, config.gateway.metrics_port, "gateway.metrics_port")
        self._controller: Any = None
        self._owner = secrets.token_hex(8)
        self._is_owner = False  # known once the controller has started for us
        self._has_taken_over = False  # a system that somebody else started
        self._has_joined_ray = False
        self._is_local = config.ray.address is None

    def __enter__(self) -> Self:
        """Starts Ray, or joins the cluster, and creates the controller. Raises StartError."""
        try:
            self._start_ray()
            self._controller = self._create_controller()
        except ConnectionError as error:
            self.stop()
            raise StartError(f"cannot join Ray at ray.address {self.config.ray.address}: {error}") from error
        except BaseException:  # Ctrl-C, too: nobody leaves a block that was not entered
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_serving(self, show: Callable[[ClusterStatus | None], None]) -> ClusterStatus:
        """Shows the status again and again until every process serves.

        Raises StartError naming each process that failed, or those that are late after ray.start_timeout_s. A system
        that ran before is then left as it is, and its controller waits for another owner; nor is it an error that one
        of its processes has failed: the controller starts that again.
        """
        try:
            return self._wait_until_serving(show)
        except StartError:
            if self._has_taken_over:
                self._controller = None
            raise

    def _wait_until_serving(self, show: Callable[[ClusterStatus | None], None]) -> ClusterStatus:
        started = self._controller.start.remote(self._owner, self.config)
        deadline = time.monotonic() + self.config.ray.start_timeout_s
        while True:
            if not self._is_owner and ray.wait([started], timeout=0)[0]:
                self._has_taken_over = not _has_created(started)
                self._is_owner = True
            status = self.status()
            show(status)
            if self._is_owner and not self._has_taken_over and status and status.failures:
                raise StartError("; ".join(status.failures))
            if self._is_owner and status and status.is_serving:
                return status
            if time.monotonic() > deadline:
                late = (
                    [name for name, health in status.processes if health.state != "ready"] if status else ["controller"]
                )
                raise StartError(
                    f"not ready after {self.config.ray.start_timeout_s:.0f} s: {', '.join(late)}; "
                    "raise ray.start_timeout_s if the checkpoint is large"
                )
            time.sleep(POLL_S)

    @property
    def address(self) -> str:
        """host:port of the gateway's gRPC server, once serving."""
        return self._gateway().address

    @property
    def metrics_address(self) -> str:
        """host:port of the Prometheus endpoint with every process's series, once serving."""
        return self._gateway().metrics_address

    def status(self) -> ClusterStatus | None:
        """The controller's latest view; None while Ray starts the controller again.

        Raises StartError when the controller is gone for good.
        """
        try:
            status: ClusterStatus | None = ray.get(
                self._controller.status.remote(self._owner), timeout=STATUS_TIMEOUT_S
            )
        except ray.exceptions.ActorUnavailableError:
            return None
        except ray.exceptions.RayError as error:
            raise StartError(f"the controller does not answer: {error}") from error
        return status

    def stop(self) -> None:
        """Drains and ends every process. Safe to call twice."""
        if self._controller is not None and self._stop_system():
            end_everything(self.config.ray.namespace)
        self._controller = None
        if self._has_joined_ray:
            if self._is_local:
                end_local_ray()
            else:
                ray.shutdown()
            self._has_joined_ray = False

    def _create_controller(self) -> Any:
        host, plan = LOOPBACK if self._is_local else None, self.plan
        return create_controller(
            self._owner, self.config, plan.expert_map, plan.placement_request, host, self._memory_budget
        )

    def _stop_system(self) -> bool:
        """In order, as far as that goes. False when the system is somebody else's."""
        timeout_s = self.config.drain_timeout_s
        try:
            return bool(ray.get(self._controller.stop.remote(self._owner, timeout_s), timeout=3 * timeout_s + 30))
        except ray.exceptions.RayError as error:
            logger.warning("the controller did not stop in order: %s", error)
        except KeyboardInterrupt:
            logger.warning("interrupted: requests in flight are cut off")
        return self._is_owner

    def _gateway(self) -> ProcessHealth:
        status = self.status()
        assert status, "only once serving"
        return next(health for name, health in status.processes if name.startswith(RoleName.GATEWAY))

    def _start_ray(self) -> None:
        if ray.is_initialized():
            return  # a process of Ray's already, as a Serve replica is
        self._has_joined_ray = True
        settings: dict[str, Any] = {
            "namespace": self.config.ray.namespace,
            "logging_level": "WARNING",
            "log_to_driver": False,
        }
        if self.config.ray.address is None:
            start_local_ray(max(os.cpu_count() or 1, int(booked_cpus(self.config)) + 1), **settings)
        else:
            check_answers(self.config.ray.address)
            ray.init(address=self.config.ray.address, **settings)


def _check_port(host: str, port: int, key: str) -> None:
    """Raises ConfigError when nothing could listen there: better known before Ray starts."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{key}: cannot listen on {host}:{port}: {error.strerror}; set another one") from error


def _has_created(started: "ray.ObjectRef[Any]") -> bool:
    """What the controller said. Raises StartError with it, without Ray's account of where it was said."""
    try:
        return bool(ray.get(started))
    except ray.exceptions.RayTaskError as error:
        raise StartError(str(error.cause)) from error
    except ray.exceptions.RayError as error:
        raise StartError(f"the controller could not start: {error}") from error
