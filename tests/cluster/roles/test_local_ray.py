"""What stops a Ray cluster of one's own before any process is started."""

import pytest

from cluster.controller.controller import StartError
from cluster.roles import local_ray
from cluster.roles.local_ray import start_local_ray


def test_a_folder_that_ray_cannot_use_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a key into the home folder
    with pytest.raises(StartError, match=r"^Ray cannot write in /proc/none: No such file or directory; set RAY_TMPDIR"):
        start_local_ray(1)


def test_a_ray_that_would_listen_to_others_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray.ray.util, "get_node_ip_address", lambda: "192.0.2.1")
    with pytest.raises(StartError, match=r"would listen on 192\.0\.2\.1"):
        start_local_ray(1)
