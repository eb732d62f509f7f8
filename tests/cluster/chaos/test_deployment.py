"""What a chaos run leaves behind, and how its configuration is put together."""

import os
import subprocess
import sys
from pathlib import Path

from cluster.chaos.deployment import FOLDER_VARIABLE, LocalDeployment, merged, processes_of


def test_changes_are_made_at_every_depth_and_the_rest_stays() -> None:
    settings = {"workers": {"count": 2, "engine": {"cache": 1}}, "model": "bundled"}
    changes = {"workers": {"engine": {"cache": 2}}, "shards": {"count": 3}}
    assert merged(settings, changes) == {
        "workers": {"count": 2, "engine": {"cache": 2}},
        "model": "bundled",
        "shards": {"count": 3},
    }
    assert settings["workers"] == {"count": 2, "engine": {"cache": 1}}


def test_a_process_is_known_by_its_folder_even_when_another_has_adopted_it() -> None:
    deployment = LocalDeployment()
    sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    environment = {**os.environ, FOLDER_VARIABLE: str(deployment.folder)}
    with deployment, subprocess.Popen(sleeper, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert [found.pid for found in processes_of(deployment.folder)] == [process.pid]
        assert processes_of(Path("/nowhere")) == []
        deployment.stop()
        assert process.wait(5.0) < 0
    assert not deployment.folder.exists()
