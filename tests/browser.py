"""A headless Chromium for tests of the dashboard. Tests that want it are skipped, with the reason, where it is not."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass(slots=True)
class Visit:
    """One open page, and what it complained of or asked of others than its own server."""

    page: Any
    origin: str
    complaints: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def value(self, script: str) -> Any:
        """A JavaScript expression's."""
        return self.page.evaluate(script)

    def wait_for(self, script: str, timeout_s: float = 30.0) -> None:
        """Until the expression is true. Playwright's own waiting evaluates text, which the page's policy forbids."""
        give_up_s = time.monotonic() + timeout_s
        while not self.page.evaluate(script):
            assert time.monotonic() < give_up_s, f"{script} is not true; the page complained of {self.complaints}"
            self.page.wait_for_timeout(50)

    def note_request(self, url: str) -> None:
        """Remembers one to another server."""
        if not url.startswith((self.origin, "data:")):
            self.strangers.append(url)

    def wait_for_updates(self, more: int) -> None:
        """So many more than there are now."""
        wanted = self.value("window.mobula ? mobula.updates.count : 0") + more
        self.wait_for(f"window.mobula && mobula.updates.count >= {wanted}")


@contextmanager
def browsers() -> Iterator[Any]:
    """A browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(NAMES)} is on the path")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def visits(browser: Any, address: str, **settings: Any) -> Iterator[Visit]:
    """The page of a server at host:port, open. settings: of Playwright's new_page."""
    visit = Visit(browser.new_page(**settings), f"http://{address}/")
    visit.page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on("request", lambda request: visit.note_request(request.url))
    try:
        visit.page.goto(visit.origin)
        yield visit
    finally:
        visit.page.close()
