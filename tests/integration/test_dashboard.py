"""The dashboard in a real browser: before a system under load, and before one of DeepSeek-V2's size that is made up."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.dashboard.web import GatewayApp
from cluster.gateway.http_server import serve_http
from cluster.gateway.metrics import GatewayMetrics
from protos import generation_pb2 as pb
from tests.browser import Visit, browsers, visits
from tests.checkpoints import write_checkpoint
from tests.dashboard_states import EXPERTS, LAYERS, MadeUpSystem
from tests.system import System

MAX_UPDATE_MS = 10.0
PIXELS = "document.getElementById('heatmap').toDataURL()"
TOKENS_OF_A_CELL = "document.querySelectorAll('#cell dd')[1].textContent"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "v2", seed=3)
    with System(folder, num_workers=1, num_shards=2) as running:
        running.greedy([5, 6, 7], 8)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers() as running:
        yield running


@pytest.fixture
def made_up() -> Iterator[tuple[MadeUpSystem, str]]:
    """It and its host:port."""
    source = MadeUpSystem()
    server, port = serve_http("127.0.0.1", 0, GatewayApp(GatewayMetrics(), source))
    yield source, f"127.0.0.1:{port}"
    server.shutdown()


def choose_all(visit: Visit) -> None:
    """The window since the start."""
    visit.page.get_by_text("all", exact=True).click()


def state_of(address: str) -> dict[str, object]:
    with urllib.request.urlopen(f"http://{address}/api/state") as response:
        answer: dict[str, object] = json.loads(response.read())
    return answer


def test_the_page_shows_what_the_calls_say_and_changes_under_load(browser: Any, system: System) -> None:
    address = system.gateway.health().metrics_address
    with visits(browser, address, viewport={"width": 1280, "height": 900}) as visit:
        choose_all(visit)
        visit.wait_for_updates(1)
        before = visit.value(PIXELS)
        system.greedy_at_once([[9, 8, 7, 6, 5]] * 4, 24)
        assert system.becomes_idle()
        visit.wait_for_updates(2)
        assert visit.value(PIXELS) != before
        load = system.stub.GetExpertLoad(pb.GetExpertLoadRequest(), timeout=10.0)
        visit.page.get_by_role("application").focus()
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
            visit.page.keyboard.press(key)
        assert visit.value(TOKENS_OF_A_CELL).startswith(f"{load.layers[1].num_tokens[2]:,} (")
        for shard in load.shards:
            label = visit.value(f"document.querySelector('[data-name=shard-{shard.ep_rank}]').ariaLabel")
            assert f"{shard.num_assignments:,} computed in all" in label
            assert shard.address in label
        assert visit.value("document.getElementById('tile-violations').textContent") == "never over the limit"
        assert visit.strangers == []
        # Nothing stands for the controller in this system, and the page says so.
        assert "the gateway does not know the controller yet" in visit.page.locator("#banner").inner_text()
        assert visit.complaints == []


def test_a_state_has_the_calls_numbers(system: System) -> None:
    state = state_of(system.gateway.health().metrics_address)
    load = system.stub.GetExpertLoad(pb.GetExpertLoadRequest(), timeout=10.0)
    placement = system.stub.GetPlacement(pb.GetPlacementRequest(), timeout=10.0)
    shown = state["load"]
    assert isinstance(shown, dict)
    assert shown["num_tokens"] == [list(layer.num_tokens) for layer in load.layers]
    assert isinstance(state["placement"], dict)
    assert [layer["expert_to_unit"] for layer in state["placement"]["layers"]] == [
        list(layer.expert_to_unit) for layer in placement.layers
    ]
    assert isinstance(state["metrics"], dict)
    assert state["metrics"]["counters"]["generation_tokens"] >= 8
    with urllib.request.urlopen(f"http://{system.gateway.health().metrics_address}/metrics") as response:
        assert b"mobula_process_up" in response.read()


def test_a_large_system_is_drawn_in_time_and_fits_a_desktop(browser: Any, made_up: tuple[MadeUpSystem, str]) -> None:
    source, address = made_up
    with visits(browser, address, viewport={"width": 1280, "height": 900}) as visit:
        visit.wait_for_updates(7)
        assert np.median(visit.value("mobula.updates.milliseconds")[-5:]) < MAX_UPDATE_MS
        assert visit.value("document.documentElement.scrollWidth") == 1280
        canvas = visit.page.locator("#heatmap").bounding_box()
        assert canvas
        visit.page.mouse.click(canvas["x"] + canvas["width"] - 2, canvas["y"] + canvas["height"] - 2)
        ranks = source.unit_ep_ranks[-1][0]
        text = visit.page.locator("#cell").inner_text()
        assert f"layer {LAYERS}, expert {EXPERTS - 1}" in text
        assert all(f"shard {rank} ·" in text for rank in ranks)
        assert visit.page.locator("#events li").count() == len(source.log.after(0))
        assert visit.complaints == []
        assert visit.strangers == []


def test_a_phone_shows_all_without_scrolling_sideways_in_either_theme(
    browser: Any, made_up: tuple[MadeUpSystem, str]
) -> None:
    _, address = made_up
    with visits(browser, address, viewport={"width": 390, "height": 844}, color_scheme="dark") as visit:
        visit.wait_for_updates(1)
        assert visit.value("document.documentElement.scrollWidth") == 390
        background = "getComputedStyle(document.body).backgroundColor"
        dark = visit.value(background)
        button = visit.page.locator("#theme")
        button.click()
        assert visit.value(background) == dark
        button.click()
        assert visit.value(background) != dark
        assert button.get_attribute("aria-label") == "Theme: light"
        assert visit.complaints == []


def test_a_paused_page_stands_still_and_a_lost_server_is_said(browser: Any, made_up: tuple[MadeUpSystem, str]) -> None:
    source, address = made_up
    with visits(browser, address, viewport={"width": 1280, "height": 900}) as visit:
        visit.wait_for_updates(1)
        source.down = "shard-5"
        visit.wait_for("document.querySelector('[data-name=shard-5] .note')?.textContent.startsWith('down')")
        assert visit.page.locator("#state").inner_text() == "degraded"
        visit.page.get_by_role("button", name="Pause").click()
        stood = visit.value("mobula.updates.count")
        visit.page.wait_for_timeout(1300)
        assert visit.value("mobula.updates.count") == stood
        visit.page.get_by_role("button", name="Resume").click()
        visit.wait_for_updates(1)
        visit.page.route("**/api/**", lambda route: route.abort())
        visit.wait_for("document.getElementById('state').textContent === 'disconnected'")
        assert "No answer from the gateway since" in visit.page.locator("#banner").inner_text()


def test_pages_that_ask_at_once_share_an_answer(system: System) -> None:
    address = system.gateway.health().metrics_address
    times = []
    threads = [threading.Thread(target=lambda: times.append(state_of(address)["time_s"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(times)) == 1


def test_a_prometheus_is_told_of_every_process_and_no_series_twice(system: System) -> None:
    address = system.gateway.health().metrics_address

    def page(target: str) -> str:
        with urllib.request.urlopen(f"http://{target}") as response:
            return str(response.read().decode())

    groups = json.loads(page(f"{address}/sd"))
    assert sorted(group["labels"]["component"] for group in groups) == ["attention", "expert", "expert", "gateway"]
    named = set()
    for group in groups:
        (line,) = (
            line
            for line in page(group["targets"][0] + group["labels"]["__metrics_path__"]).splitlines()
            if line.startswith("mobula_build_info{")
        )
        named.add(line.split('"')[1])
    assert named == {"gateway-0", "worker-0", "shard-0", "shard-1"}
    whole = page(f"{address}/metrics")
    assert whole.count("mobula_build_info{") == 4
    assert whole.count("# TYPE mobula_build_info gauge") == 1
    assert "mobula_gateway_requests_in_flight" in whole


def test_what_is_not_there_is_not_found(made_up: tuple[MadeUpSystem, str]) -> None:
    _, address = made_up
    for path, status in (("/nothing", 404), ("/../config.py", 404), ("/api/state?placement=x", 400)):
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"http://{address}{path}")
        assert raised.value.code == status


def test_the_files_of_the_page_ask_for_nothing_elsewhere() -> None:
    folder = Path(__file__).parents[2] / "cluster" / "dashboard" / "page"
    for file in folder.iterdir():
        if file.suffix in (".html", ".css", ".js") and not file.name.startswith("uPlot"):
            text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text, file
            assert "https://" not in text, file
