"""Takes the dashboard's pictures of the documentation: python -m tests.dashboard_screenshots docs"""

import sys
from pathlib import Path

from cluster.dashboard.web import GatewayApp
from cluster.gateway.http_server import serve_http
from cluster.gateway.metrics import GatewayMetrics
from tests.browser import browsers, visits
from tests.dashboard_states import MadeUpSystem

PICTURES = {
    "desktop": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}
NUM_UPDATES = 45  # so that the charts have lines


def main(folder: Path) -> None:
    for name, settings in PICTURES.items():
        app = GatewayApp(GatewayMetrics(), MadeUpSystem())
        server, port = serve_http("127.0.0.1", 0, app)
        with browsers() as browser, visits(browser, f"127.0.0.1:{port}", **settings) as visit:
            visit.wait_for(f"window.mobula && mobula.updates.count >= {NUM_UPDATES}", timeout_s=90.0)
            box = visit.page.locator("#heatmap").bounding_box()
            visit.page.mouse.click(box["x"] + 0.43 * box["width"], box["y"] + 0.4 * box["height"])
            if name != "phone":
                visit.page.mouse.move(box["x"] + 0.63 * box["width"], box["y"] + 0.5 * box["height"])
            visit.page.screenshot(path=folder / f"dashboard-{name}.png", full_page=True)
        server.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
