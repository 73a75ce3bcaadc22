"""A real Chromium that looks at any base URL, in light or dark, at any size. What it complains of fails the test: errors in the
console, exceptions, violations of the Content-Security-Policy, and dialogs of the browser itself (somebody's alert)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from playwright.sync_api import Browser as Chromium
from playwright.sync_api import ConsoleMessage, Dialog, Error, Locator, Page, Playwright, expect, sync_playwright

ARGUMENTS = [
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 15_000.0  # milliseconds until what is expected must be there; a look of the page is two seconds
SCREENSHOTS = "HIBERNODE_TEST_SCREENSHOTS"  # where they go; nowhere if it is not set

expect.set_options(timeout=PATIENCE)

_TELL_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
    console.error(`CSP: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
"""

# The contrast of each element's text and of what is behind it, as WCAG 2 defines it. All in one call: there are hundreds.
_CONTRASTS = """(nodes) => {
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const known = new Map();
    const bytes = (colour) => {
        if (!known.has(colour)) {
            context.clearRect(0, 0, 1, 1);
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
            known.set(colour, [...context.getImageData(0, 0, 1, 1).data]);
        }
        return known.get(colour);
    };
    const light = (colour) => {
        const [r, g, b] = colour.slice(0, 3).map((byte) => byte / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return nodes.map((node) => {
        let behind = node;
        while (behind && bytes(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
        const ground = light(behind ? bytes(getComputedStyle(behind).backgroundColor) : [255, 255, 255]);
        const [low, high] = [light(bytes(getComputedStyle(node).color)), ground].sort((a, b) => a - b);
        return [(high + 0.05) / (low + 0.05), ground, node.outerHTML.slice(0, 200)];
    });
}"""


@dataclass(frozen=True)
class Contrast:
    ratio: float
    ground: float  # luminance of the background: 0 is black, 1 white
    element: str


def contrasts(elements: Locator) -> list[Contrast]:
    return [Contrast(float(ratio), float(ground), element) for ratio, ground, element in elements.evaluate_all(_CONTRASTS)]


@dataclass
class View:
    """One page of the browser, and what went wrong on it."""

    page: Page
    base: str
    problems: list[str] = field(default_factory=list)
    allowed: list[re.Pattern[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", self._page_error)
        self.page.on("dialog", self._dialog)

    def open(self, fragment: str = "") -> Self:
        """`#/nodes`, from the outside: a fresh document."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.base}/{fragment}")
        return self

    def allow(self, pattern: str) -> None:
        """Something the browser says because of what the test does: a status that is an error, a server that is away."""
        self.allowed.append(re.compile(pattern))

    def check(self) -> None:
        found = [problem for problem in self.problems if not any(pattern.search(problem) for pattern in self.allowed)]
        assert not found, "\n".join(["the browser complains:", *found])

    def overflow(self) -> float:
        """Pixels that the document is wider than its window, or its main part than its place."""
        wider = "Math.max(...[document.documentElement, document.querySelector('main')].map((node) => node.scrollWidth - node.clientWidth))"
        return float(self.page.evaluate(wider))

    def screenshot(self, name: str, otherwise: Path) -> Path:
        path = Path(os.environ.get(SCREENSHOTS) or otherwise) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, full_page=True, animations="disabled")
        return path

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _page_error(self, error: Error) -> None:
        self.problems.append(f"exception: {error}")

    def _dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"a dialog of the browser: {dialog.message}")
        dialog.dismiss()


class Browser:
    """Debian's Chromium. While it runs, its event loop does too, in this thread: no asyncio beside it."""

    def __enter__(self) -> Self:
        path = shutil.which("chromium")
        if path is None:
            raise FileNotFoundError("no chromium in PATH: scripts/test installs it")
        self._playwright: Playwright = sync_playwright().start()
        try:
            self._chromium: Chromium = self._playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        except BaseException:
            self._playwright.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._chromium.close()
        finally:
            self._playwright.stop()

    @contextmanager
    def view(self, base: str, *, dark: bool = False, width: int = 1280, height: int = 800) -> Iterator[View]:
        """A page with storage of its own. Complaints are looked at when the `with` ends without an error of its own."""
        context = self._chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            locale="en-GB",
            timezone_id="UTC",
        )
        try:
            context.set_default_timeout(PATIENCE)
            context.add_init_script(_TELL_VIOLATIONS)
            view = View(context.new_page(), base.rstrip("/"))
            yield view
            view.check()
        finally:
            context.close()
