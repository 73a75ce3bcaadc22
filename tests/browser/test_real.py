"""The page before the real thing: API, broker and daemon. What a person would do: look who runs where, checkpoint, watch, restore, cancel.

Its pictures are those of docs/api.md: HIBERNODE_TEST_SCREENSHOTS=docs/images makes them anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import expect

from hibernode._pb import hibernode_pb2 as pb
from tests.api_client import ApiServer
from tests.browser.browser import Browser, View
from tests.daemon import ROOT, Daemon
from tests.keeper import wait_until
from tests.nats_server import NatsServer
from tests.node.workload import beats, python

pytestmark = [pytest.mark.node, pytest.mark.timeout(240)]

SETTINGS = {"limits": {"node_interval": 2.0, "progress_interval": 0.1}}


@pytest.fixture
def real(tmp_path: Path) -> Iterator[tuple[ApiServer, Daemon]]:
    with ExitStack() as stack:
        nats = stack.enter_context(NatsServer(tmp_path / "nats"))
        api = stack.enter_context(ApiServer(nats.url, settings="shared_file_stores = true"))
        daemons = [
            stack.enter_context(
                Daemon(bus=nats.url, node=node, store=f"file://{tmp_path}/store", arena="512MiB", settings=SETTINGS)
            )
            for node in ("gpu-01", "gpu-02")
        ]
        wait_until(lambda: len(api.get("/v2/nodes")) == len(daemons), 30, "both nodes")
        yield api, daemons[0]


def test_a_workload_is_checkpointed_watched_restored_and_what_fails_is_explained(
    browser: Browser, real: tuple[ApiServer, Daemon], tmp_path: Path
) -> None:
    api, daemon = real
    daemon.run("counter", python("counter.py", 0.02))
    train = [sys.executable, str(ROOT / "examples" / "train.py"), "--mib", "300"]
    daemon.run("trainer", train, cwd="/")
    wait_until(lambda: daemon.job_lines("trainer") and beats(daemon.job_lines("counter")), 60, "both jobs to work")
    before = beats(daemon.job_lines("counter"))[-1]
    with browser.view(api.url, width=1440, height=900) as view:
        page = view.page
        view.open(f"#token={api.token}")
        expect(page).not_to_have_url(re.compile("token"))
        page.keyboard.press("g")
        page.keyboard.press("n")
        expect(page.get_by_role("button", name="Checkpoint default/trainer")).to_be_visible(timeout=30_000)
        view.screenshot("nodes", tmp_path)

        _checkpoint(view, "counter")
        expect(page.locator(".mark").first).to_have_text("ready", timeout=60_000)
        made = page.url.rpartition("/")[2]
        assert api.status(made) == "ready"

        view.open("#/nodes")
        # half a minute: long enough to be seen and cancelled on a slow machine
        _checkpoint(view, "trainer", compression="zstd:19")
        expect(page.get_by_role("progressbar").first).to_be_visible(timeout=30_000)
        expect(page.locator("body")).to_contain_text(re.compile(r"(dumping|shipping) \d+ %"), timeout=30_000)
        view.screenshot("running", tmp_path)
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the checkpoint").click()
        expect(page.locator("body")).to_contain_text("cancelled", timeout=60_000)

        # Its pids are taken: the original runs. The page says what the daemon says, with the hint.
        view.open(f"#/actions/{made}")
        page.get_by_role("button", name="Restore").click()
        page.get_by_role("dialog").get_by_role("textbox").first.fill("another")
        page.get_by_role("dialog").get_by_role("button", name="Restore").click()
        expect(page.locator("body")).to_contain_text("pid_taken", timeout=60_000)
        expect(page.locator("body")).to_contain_text("restore on another node")
        view.screenshot("failed", tmp_path)

        daemon.stub.StopJob(pb.StopRequest(name="counter", signal="KILL"), timeout=20)
        view.open("#/checkpoints")
        page.get_by_role("button", name="Restore default/counter").click()
        page.get_by_role("dialog").get_by_role("button", name="Restore").click()
        expect(page.locator(".mark").first).to_have_text("ready", timeout=60_000)

        page.keyboard.press("g")
        page.keyboard.press("a")
        expect(page.locator("table.rows tbody tr")).to_have_count(4)
        view.screenshot("actions", tmp_path)
    wait_until(lambda: beats(daemon.job_lines("counter"))[-1].counter > before.counter + 1, 30, "the counter to go on")
    assert {beat.token for beat in beats(daemon.job_lines("counter"))} == {before.token}


def _checkpoint(view: View, name: str, compression: str = "") -> None:
    """From the nodes' page, by its dialog; ends at the new action."""
    page = view.page
    page.get_by_role("button", name=f"Checkpoint default/{name}").click(timeout=30_000)
    asked = page.get_by_role("dialog")
    if compression:
        asked.get_by_label(re.compile("compression", re.IGNORECASE)).fill(compression)
    asked.get_by_role("button", name="Checkpoint").click()
    expect(page).to_have_url(re.compile(r"#/actions/[0-9a-f-]{36}"))


def test_the_document_of_the_api_is_there_for_people(browser: Browser, real: tuple[ApiServer, Daemon]) -> None:
    api, _ = real
    with browser.view(api.url) as view:
        view.page.goto(f"{api.url}/docs.html")
        expect(view.page.locator("#state")).to_contain_text("operations")
        for path in api.get("/openapi.json")["paths"]:
            expect(view.page.locator("h2").filter(has_text=re.compile(re.escape(path) + r"\s")).first).to_be_visible()
        view.page.get_by_role("link", name="Actions").click()
        expect(view.page.get_by_role("button", name="Enter a token")).to_be_visible()
        view.allow(r"status of 401")
