"""Around the other parts: configuration, checkpoint, controller, gateway, Ray actors, command line."""

import os


def _import_grpc_without_event_engine() -> None:
    """gRPC reads the setting once, when it is imported: a stream's round trip takes a fifth to a half less without.

    It does not stay in the environment, where Ray's own gRPC in processes that are started from here would read it.
    """
    given = os.environ.get("GRPC_EXPERIMENTS")
    if given is None:
        os.environ["GRPC_EXPERIMENTS"] = "-event_engine_client,-event_engine_listener"
    import grpc  # noqa: F401

    if given is None:
        del os.environ["GRPC_EXPERIMENTS"]


_import_grpc_without_event_engine()
