"""A page as a parser and as a browser without a window see it."""

from __future__ import annotations

import html.parser
import shutil
import subprocess
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(html.parser.HTMLParser):
    """Scripts by their id, every element that carries data, and what the page would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.cells: list[dict[str, str]] = []
        self.loaded: list[str] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attributes}
        if tag == "script":
            self._script = found.get("id", "")
            self.scripts[self._script] = ""
        if any(key.startswith("data-") for key in found):
            self.cells.append(found)
        self.loaded += [found[key] for key in ("src", "href") if key in found and found[key] != "data:,"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] += data


def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={path.parent / 'browser'}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    return subprocess.run([*command, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
