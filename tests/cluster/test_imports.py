"""What small processes import: torch is 130 MB of memory and seconds of start, and they compute nothing."""

import subprocess
import sys

import pytest

LIGHT_MODULES = (
    "cluster.roles.actors",
    "cluster.controller.controller",
    "cluster.roles.gateway_role",
    "cluster.commands.cli",
)


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_a_process_that_computes_nothing_imports_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_openmp_and_grpc_find_their_settings_when_they_are_loaded() -> None:
    program = (
        "import sys, cluster.roles.shard_role; names = list(sys.modules);"
        "sys.exit(names.index('cluster.environment') > min(names.index('torch'), names.index('grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
