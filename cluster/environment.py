"""What libraries read from the environment once, when they are loaded. Importing `cluster` settles it before anything
else, so that it is the same in every process of ours, whoever started it. What a user has set stays.
"""

import os


def prepare() -> None:
    """To be called before torch, gRPC or Ray are imported."""
    # Idle OpenMP threads must sleep: spinning ones take the cores of the other processes (a step takes 1.6 x as long).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # A thousand characters from Ray that suspect the kernel, whatever ended a process. The log says which one was lost.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed while executing a task")
    _import_grpc_without_event_engine()


def _import_grpc_without_event_engine() -> None:
    """A stream's round trip takes a fifth to a half less without.

    The setting does not stay in the environment, where Ray's own gRPC in processes that are started from here would
    read it.
    """
    given = os.environ.get("GRPC_EXPERIMENTS")
    if given is None:
        os.environ["GRPC_EXPERIMENTS"] = "-event_engine_client,-event_engine_listener"
    import grpc  # noqa: F401

    if given is None:
        del os.environ["GRPC_EXPERIMENTS"]
