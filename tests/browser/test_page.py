"""The page as people use it: by mouse, by keyboard alone, in light and dark, narrow and wide, with a server that refuses or is away."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.browser import Browser, View, contrasts
from tests.browser.stub import GIB, JSON, MIB, Stub, action, checkpoint, event, failed, node, refusal, running, told, workload

HOSTILE = "<img src=x onerror=alert(1)>"
QUIETLY = r"Failed to load resource: the server responded with a status of (400|401|404)"
GONE = r"Failed to load resource: net::ERR_"


def rows(view: View) -> Locator:
    return view.page.locator("table.rows tbody tr")


def row(view: View, action_id: str) -> Locator:
    return view.page.locator(f'tr[data-id="{action_id}"]')


def dialog(view: View) -> Locator:
    return view.page.get_by_role("dialog")


# ------------------------------------------------------------------------------------------- actions


def test_a_running_action_is_followed_until_ready_without_a_reload(view: View, stub: Stub) -> None:
    stub.actions = [running("a1", share=0.4), action("a0")]
    view.open()
    first = row(view, "a1")
    expect(first).to_contain_text("processing")
    expect(first).to_contain_text("shipping 40 %")
    expect(first.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "40")
    first.evaluate("(row) => { row.mine = true; row.focus(); }")
    row(view, "a0").evaluate("(row) => getSelection().selectAllChildren(row.cells[2])")

    stub.change(
        "a1",
        progress={"phase": "shipping", "bytes_done": 7 * GIB, "bytes_total": 10 * GIB, "stored_bytes": 2 * GIB, "seconds": 6.0},
    )
    stub.actions.insert(0, running("a2", pod_name="second"))
    expect(first).to_contain_text("shipping 70 %")
    expect(rows(view)).to_have_count(3)
    expect(rows(view).first).to_contain_text("ml/second")

    stub.change(
        "a1",
        status="ready",
        progress=None,
        total_duration=9_700_000_000,
        pause_ns=412_000_000,
        raw_bytes=10 * GIB,
        stored_bytes=3 * GIB,
    )
    expect(first.locator(".mark")).to_have_text("ready")
    expect(first).to_contain_text("10.0 GiB → 3.00 GiB")
    expect(first).to_contain_text("9.7 s")
    expect(first).to_contain_text("412 ms")
    expect(first.get_by_role("progressbar")).to_be_hidden()
    expect(view.page.locator("#live")).to_have_text("checkpoint of ml/trainer: ready")
    assert first.evaluate("(row) => row.mine === true && document.activeElement === row")
    assert view.page.evaluate("getSelection().toString()").strip() == "ml/trainer"


def test_filters_are_in_the_address_and_back_leads_to_where_one_came_from(view: View, stub: Stub) -> None:
    stub.actions = [
        failed("a3", pod_name="other"),
        action("a2", type="restore", node_name="gpu-02"),
        action("a1"),
        action("a0", namespace="web"),
    ]
    view.open("#/nodes")
    page = view.page
    page.get_by_role("link", name="Actions", exact=True).click()
    expect(rows(view)).to_have_count(4)

    page.get_by_label("Status").select_option("error")
    expect(rows(view)).to_have_count(1)
    expect(page).to_have_url(re.compile(r"#/actions\?status=error$"))
    page.get_by_label("Status").select_option("")
    page.get_by_label("Type").select_option("restore")
    expect(rows(view)).to_have_count(1)
    page.get_by_label("Node").fill("gpu-01")
    page.get_by_label("Node").press("Enter")
    expect(page.get_by_text("No action fits these filters")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(rows(view)).to_have_count(4)
    page.get_by_label("Pod").fill("web/")
    page.get_by_label("Pod").press("Enter")
    expect(rows(view)).to_have_count(1)
    page.get_by_label("Pod").fill("ml/trainer")
    page.get_by_label("Pod").press("Enter")
    expect(rows(view)).to_have_count(2)
    asked = stub.gets("/v2/actions")[-1].query
    assert asked == {"namespace": "ml", "pod_name": "trainer", "limit": "50"}

    page.go_back()
    expect(page.get_by_role("heading", name="Nodes")).to_be_visible()
    view.open("#/actions?status=ready&pod=ml%2Ftrainer&node=gpu-02")  # as somebody else gets it
    expect(rows(view)).to_have_count(1)
    expect(page.get_by_label("Status")).to_have_value("ready")
    expect(page.get_by_label("Pod")).to_have_value("ml/trainer")


def test_a_filter_that_the_api_refuses_shows_why_and_no_rows(view: View, stub: Stub) -> None:
    view.allow(QUIETLY)
    stub.actions = [action("a1")]
    view.open("#/actions?node=a%00b")
    expect(view.page.get_by_text("No action fits these filters")).to_be_visible()
    stub.refusals["/v2/actions"] = refusal(400, "bad_command", "node: no such character", hint="names are printable")
    expect(view.page.get_by_role("alert")).to_contain_text("names are printable")
    expect(view.page.get_by_text("No action fits these filters")).to_be_hidden()
    expect(view.page.locator(".banner.bad")).to_be_hidden()
    stub.refusals.clear()
    view.page.get_by_role("button", name="Clear").click()
    expect(rows(view)).to_have_count(1)
    expect(view.page.get_by_role("alert")).to_be_hidden()


def test_older_pages_follow_the_link_of_the_answer(view: View, stub: Stub) -> None:
    stub.actions = [action(f"a{number:03}") for number in range(119, -1, -1)]
    view.open("#/actions?status=ready")
    expect(rows(view)).to_have_count(50)
    view.page.get_by_role("link", name="Older").click()
    expect(row(view, "a069")).to_be_visible()
    expect(rows(view)).to_have_count(50)
    view.page.get_by_role("link", name="Older").click()
    expect(rows(view)).to_have_count(20)
    expect(view.page.get_by_role("link", name="Older")).to_be_hidden()
    assert stub.gets("/v2/actions")[-1].query == {"status": "ready", "limit": "50", "before": "a020"}
    view.page.go_back()
    expect(row(view, "a069")).to_be_visible()
    view.page.get_by_role("link", name="Newest").click()
    expect(row(view, "a119")).to_be_visible()
    expect(view.page.get_by_label("Status")).to_have_value("ready")


def test_empty_views_say_what_to_do(view: View) -> None:
    view.open()
    expect(view.page.get_by_text("No actions yet.")).to_be_visible()
    expect(view.page.get_by_text("hibernode checkpoint NAME")).to_be_visible()
    view.open("#/checkpoints")
    expect(view.page.get_by_text("No checkpoints.")).to_be_visible()
    view.open("#/nodes")
    expect(view.page.get_by_text("No node has said a word yet.")).to_be_visible()


def test_nobody_asks_while_nobody_looks(view: View, stub: Stub) -> None:
    stub.actions = [action("a1")]
    view.page.clock.install()
    view.open()
    expect(rows(view)).to_have_count(1)
    view.page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", {get: () => window.away, configurable: true});
            window.away = true;
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    before = len(stub.gets("/v2/actions"))
    view.page.clock.run_for(60_000)
    assert len(stub.gets("/v2/actions")) <= before + 1  # one may have been on its way
    stub.actions.insert(0, action("a2"))
    view.page.evaluate("() => { window.away = false; document.dispatchEvent(new Event('visibilitychange')); }")
    expect(rows(view)).to_have_count(2)


# ---------------------------------------------------------------------------------------- one action


def test_one_action_shows_where_its_time_and_its_bytes_went(view: View, stub: Stub) -> None:
    stub.actions = [told(action("a1")), told(action("r1", type="restore", source_action_id="a1"))]
    view.open("#/actions/a1")
    page = view.page
    expect(page.get_by_role("heading", name="Checkpoint of ml/trainer")).to_be_visible()
    numbers = page.get_by_label("What it took")
    for name, value in {
        "Pause": "412 ms",
        "Raw": "10.0 GiB",
        "Zero pages": "2.00 GiB",
        "Stored": "3.00 GiB",
        "Ratio": "3.3x",
        "Rate": "1.03 GiB/s",
    }.items():
        expect(numbers.locator("div", has=page.get_by_text(name, exact=True)).locator("dd")).to_have_text(value)
    phases = page.get_by_role("table", name="Phases").locator("tbody tr")
    expect(phases.locator("th")).to_have_text(["preflight", "dumping", "shipping", "committing", "unaccounted"])
    expect(phases.nth(2)).to_contain_text("7.4 s")
    expect(phases.nth(2)).to_contain_text("3.00 GiB")
    assert phases.nth(2).locator(".fill").get_attribute("width") == "100.00%"
    assert phases.nth(3).locator(".fill").get_attribute("width") == "16.22%"
    events = page.get_by_role("table", name="Timeline").locator("tbody tr")
    expect(events.locator(".mark")).to_have_text(["initialized", "processing", "checkpoint created", "ready"])
    expect(events.nth(3)).to_contain_text(re.compile(r"\+9\.[67]\d\d s"))
    expect(page.get_by_role("button", name="Restore")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()

    view.open("#/actions/r1")
    expect(page.get_by_role("heading", name="Restore of ml/trainer")).to_be_visible()
    expect(page.get_by_role("button", name="Restore")).to_be_hidden()
    page.get_by_role("link", name="a1", exact=True).click()
    expect(page.get_by_role("heading", name="Checkpoint of ml/trainer")).to_be_visible()


def test_the_curl_command_is_the_request_without_the_token(view: View, stub: Stub) -> None:
    stub.token = "s3cret"
    overrides = {"asynchronous": True, "compression": "zstd:1", "criu_opts": None, "directory": None, "streams": 4}
    stub.actions = [action("a1", pod_name="it's", overrides=overrides)]
    view.open("#token=s3cret")
    view.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    rows(view).first.get_by_role("link").click()
    line = view.page.locator("pre")
    expect(line).to_contain_text("/v2/checkpoint/pod")
    view.page.get_by_role("button", name="Copy as curl").click()
    expect(view.page.get_by_text("copied")).to_be_visible()
    copied = view.page.evaluate("navigator.clipboard.readText()")
    assert copied == line.text_content()
    assert "s3cret" not in copied
    assert "$HIBERNODE_TOKEN" in copied
    sent = json.loads(copied.rpartition(" -d ")[2][1:-1].replace("'\\''", "'"))
    assert sent == {
        "pod_id": "uid-a1",
        "namespace": "ml",
        "pod_name": "it's",
        "kind": "simple",
        "reason": "manual",
        "overrides": overrides,
    }


def test_an_error_says_what_to_do(view: View, stub: Stub) -> None:
    stub.actions = [
        failed(
            "a1",
            events=[
                event(1, "initialized", 0),
                event(2, "error", 0.31, code="tcp_established", message="the workload has 2 TCP connections"),
            ],
        )
    ]
    view.open()
    expect(rows(view).first).to_contain_text("tcp_established")
    rows(view).first.click()
    wrong = view.page.get_by_role("alert")
    expect(wrong).to_contain_text("tcp_established")
    expect(wrong).to_contain_text("the workload has 2 TCP connections")
    expect(wrong).to_contain_text('give criu_opts {"tcp": "close"}')
    expect(wrong.locator("dt")).to_have_text(["property", "found", "wanted"])
    expect(wrong.locator("dd").nth(1)).to_contain_text("10.0.0.7:51234 -> 10.0.0.9:5432")
    expect(view.page.get_by_role("button", name="Restore")).to_be_hidden()


def test_a_status_that_only_the_control_plane_knows_is_said_to_be_provisional(view: View, stub: Stub) -> None:
    stub.actions = [running("a1", status="initialized", progress=None, provisional=True)]
    view.open()
    expect(rows(view).first).to_contain_text("provisional")
    rows(view).first.click()
    expect(view.page.get_by_text("Provisional: this is the control plane's own word.")).to_be_visible()
    stub.change("a1", status="processing", provisional=False)
    expect(view.page.get_by_text("Provisional: this is the control plane's own word.")).to_be_hidden()


def test_an_action_that_nobody_knows(view: View) -> None:
    view.allow(QUIETLY)
    view.open("#/actions/%E0%A4%A")  # nor is it an encoded name
    expect(view.page.get_by_text("No such action")).to_be_visible()
    expect(view.page.locator(".banner.bad")).to_be_hidden()


# -------------------------------------------------------------------------------------- hostile text


def test_names_messages_and_hints_are_text(view: View, stub: Stub) -> None:
    backwards = "gpj.\u202egnp.exe"
    bad = {
        "code": HOSTILE,
        "message": f"{HOSTILE}\x07",
        "hint": f"</p><script>alert(2)</script>{backwards}",
        "property": HOSTILE,
        "found": {HOSTILE: [HOSTILE]},
        "wanted": HOSTILE,
        HOSTILE: HOSTILE,
    }
    names: dict[str, Any] = {
        "namespace": HOSTILE,
        "pod_name": HOSTILE,
        "node_name": HOSTILE,
        "reason": HOSTILE,
        "location": HOSTILE,
    }
    stub.actions = [
        failed(
            f"{HOSTILE}/../?#",
            details=bad,
            events=[event(1, "error", 0, code=HOSTILE, message=HOSTILE)],
            phases=[{"name": HOSTILE, "seconds": 1.0, "bytes": 5}],
            **names,
        ),
        running("a0", phase=HOSTILE, status=f'"><{HOSTILE}', **names),
    ]
    stub.checkpoints = [checkpoint(action("a9", **names))]
    stub.nodes = [
        node(
            HOSTILE,
            gpus=[HOSTILE, {"name": HOSTILE}],
            store=f"javascript:alert(3)//{HOSTILE}",
            workloads=[workload(HOSTILE, namespace=HOSTILE, uid=HOSTILE)],
        )
    ]
    view.open()
    expect(rows(view)).to_have_count(2)
    expect(rows(view).first).to_contain_text(f"{HOSTILE}/{HOSTILE}")
    rows(view).first.click()
    wrong = view.page.get_by_role("alert")
    expect(wrong).to_contain_text(f"{HOSTILE}\ufffd")
    expect(wrong).to_contain_text("<script>alert(2)</script>gpj.\ufffdgnp.exe")
    expect(view.page.get_by_role("table", name="Timeline")).to_contain_text(HOSTILE)
    view.page.get_by_role("link", name="Checkpoints").click()
    expect(rows(view)).to_contain_text([f"{HOSTILE}/{HOSTILE}"])
    rows(view).get_by_role("button").click()
    expect(dialog(view)).to_contain_text(HOSTILE)
    view.page.keyboard.press("Escape")
    view.page.get_by_role("link", name="Nodes", exact=True).click()
    expect(view.page.get_by_role("heading", name=HOSTILE)).to_be_visible()
    view.page.get_by_role("button", name=f"Checkpoint {HOSTILE}").click()
    expect(dialog(view)).to_contain_text(HOSTILE)
    assert view.page.evaluate("document.querySelectorAll('img, main script, dialog script, [onerror]').length") == 0
    assert view.page.evaluate(
        "[...document.links].every((link) => link.href.startsWith(location.origin + '/#') || link.href === location.origin + '/docs.html')"
    )


# ------------------------------------------------------------------------------------------- dialogs


def test_a_checkpoint_is_filed_from_a_node(view: View, stub: Stub) -> None:
    stub.nodes = [node("gpu-01")]
    view.open("#/nodes")
    view.page.get_by_role("button", name="Checkpoint ml/trainer").click()
    asked = dialog(view)
    expect(asked.get_by_role("heading", name="Checkpoint ml/trainer")).to_be_visible()
    asked.get_by_label("Compression").fill("zstd:3")
    asked.get_by_label("Streams").fill("4")
    asked.get_by_label("asynchronous").check()
    asked.get_by_label("kill after ready").check()
    asked.get_by_role("button", name="Checkpoint").click()
    expect(view.page).to_have_url(f"{stub.base}/#/actions/new-checkpoint")
    expect(dialog(view)).to_have_count(0)
    expect(view.page.get_by_role("heading", name="Checkpoint of ml/trainer")).to_be_visible()
    wishes = {
        "asynchronous": True,
        "compression": "zstd:3",
        "criu_opts": '{"leave_running": false}',
        "directory": None,
        "streams": 4,
    }
    who = {"pod_id": "uid-trainer", "namespace": "ml", "pod_name": "trainer"}
    assert stub.posts() == [("/v2/checkpoint/pod", {**who, "kind": "simple", "reason": "manual", "overrides": wishes})]


def test_a_checkpoint_of_a_pod_without_any_wish(view: View, stub: Stub) -> None:
    stub.nodes = [node("gpu-01", workloads=[workload("web", kind="pod", uid=None, namespace="prod")])]
    view.open("#/nodes")
    view.page.get_by_role("button", name="Checkpoint prod/web").click()
    dialog(view).get_by_label("Kind").select_option("rootfs")
    dialog(view).get_by_role("button", name="Checkpoint").click()
    expect(view.page).to_have_url(f"{stub.base}/#/actions/new-checkpoint")
    nothing = {"asynchronous": False, "compression": None, "criu_opts": None, "directory": None, "streams": 0}
    who = {"pod_id": None, "namespace": "prod", "pod_name": "web"}
    assert stub.posts() == [("/v2/checkpoint/pod", {**who, "kind": "rootfs", "reason": "manual", "overrides": nothing})]


def test_a_checkpoint_is_restored_under_another_name(view: View, stub: Stub) -> None:
    stub.checkpoints = [checkpoint(action("a2", pod_name="second")), checkpoint(action("a1"))]
    view.open("#/checkpoints")
    expect(rows(view)).to_have_count(2)
    expect(rows(view).first).to_contain_text("3.3x")
    view.page.get_by_role("button", name="Restore ml/trainer").click()
    dialog(view).get_by_label("Pod name").fill("trainer-2")
    dialog(view).get_by_role("button", name="Restore").click()
    expect(view.page).to_have_url(f"{stub.base}/#/actions/new-restore")
    assert stub.posts() == [
        ("/v2/restore/pod", {"action_id": "a1", "reason": "manual", "overrides": {"criu_opts": None, "pod_name": "trainer-2"}})
    ]


def test_a_deleted_checkpoint_goes_from_the_list(view: View, stub: Stub) -> None:
    stub.checkpoints = [checkpoint(action("a2")), checkpoint(action("a1"))]
    view.open("#/checkpoints")
    expect(rows(view)).to_have_count(2)
    rows(view).first.focus()
    del stub.checkpoints[0]
    expect(rows(view)).to_have_count(1)
    expect(rows(view).first).to_be_focused()  # the next one has it now


def test_a_ready_checkpoint_is_restored_from_its_action(view: View, stub: Stub) -> None:
    stub.actions = [action("a1")]
    view.open("#/actions/a1")
    view.page.get_by_role("button", name="Restore").click()
    dialog(view).get_by_role("button", name="Restore").click()
    expect(view.page).to_have_url(f"{stub.base}/#/actions/new-restore")
    assert stub.posts() == [
        ("/v2/restore/pod", {"action_id": "a1", "reason": "manual", "overrides": {"criu_opts": None, "pod_name": None}})
    ]


def test_a_running_action_is_cancelled_after_a_question(view: View, stub: Stub) -> None:
    stub.actions = [running("a1")]
    view.open("#/actions/a1")
    view.page.get_by_role("button", name="Cancel").click()
    dialog(view).get_by_role("button", name="Let it go on").click()
    expect(dialog(view)).to_have_count(0)
    assert stub.posts() == []
    view.page.get_by_role("button", name="Cancel").click()
    dialog(view).get_by_role("button", name="Cancel the checkpoint").click()
    expect(view.page.get_by_role("alert")).to_contain_text("cancelled")
    expect(view.page.get_by_role("button", name="Cancel")).to_be_hidden()
    assert stub.posts() == [("/v2/actions/a1/cancel", None)]


def test_a_node_shows_its_gpus_and_why_they_are_not_known(view: View, stub: Stub) -> None:
    def gpu(**facts: object) -> dict[str, object]:
        return {"index": 0, "name": "NVIDIA H100", "memory_total": 80 * GIB, "memory_used": 10 * GIB, **facts}

    stub.nodes = [
        node("whole", gpus=[gpu(), gpu()], gpu_driver="580.65.06", gpu_reason=""),
        node("half", gpus=[gpu(), gpu(memory_used=None)], gpu_driver="580.65.06", gpu_reason="NVML does not answer"),
        node("none", gpus=[], gpu_driver="", gpu_reason="no NVIDIA driver"),
    ]
    view.open("#/nodes")
    whole, half, none = (view.page.get_by_label(f"node {name}", exact=True) for name in ("whole", "half", "none"))
    expect(whole).to_contain_text("2 × NVIDIA H100")
    expect(whole).to_contain_text("20.0 of 160 GiB used")
    expect(whole).to_contain_text("580.65.06")
    expect(half).to_contain_text("2 × NVIDIA H100 (NVML does not answer)")
    expect(half).to_contain_text("10.0 of 80.0 GiB used")
    expect(none).to_contain_text("no NVIDIA driver")


def test_a_node_shows_what_its_pods_ask_for_and_what_is_wrong_with_it(view: View, stub: Stub) -> None:
    known = {"namespace": "ml", "pod_id": "u", "interval": 600, "keep_last": 3, "problem": ""}
    wrong = {**known, "pod_name": "bad", "problem": 'hibernode.io/heartbeat is "soon"'}
    stub.nodes = [node("one", heartbeats=[{**known, "pod_name": "well"}, wrong]), node("two")]
    view.open("#/nodes")
    one, two = (view.page.get_by_label(f"node {name}", exact=True) for name in ("one", "two"))
    expect(one).to_contain_text("of 1 pod, by annotation")
    expect(one).to_contain_text("ml/bad")
    expect(one).to_contain_text('hibernode.io/heartbeat is "soon"')
    expect(two).not_to_contain_text("Heartbeats")


def test_a_node_leaves_after_a_question(view: View, stub: Stub) -> None:
    stub.nodes = [node("gpu/01", workloads=[workload("trainer"), workload("bad")]), node("gpu-02")]
    stub.actions = [running("c1")]
    nobody = {"namespace": "ml", "checkpoint_action_id": None, "restore_action_id": None}
    stub.left = [
        nobody | {"pod_name": "trainer", "pod_id": "1", "checkpoint_action_id": "c1", "state": "checkpointing", "message": None},
        nobody | {"pod_name": "bad", "pod_id": "2", "state": "refused", "message": HOSTILE},
    ]
    view.open("#/nodes")
    view.page.get_by_role("button", name="Node gpu/01 leaves").click()
    asked = dialog(view)
    expect(asked).to_contain_text("2 workloads")
    asked.get_by_label("nodeUnschedulable").check()
    assert stub.posts() == []
    expect(asked.get_by_role("button", name="Close")).to_have_attribute("autofocus", "")
    asked.get_by_role("button", name="gpu/01 leaves").click()
    answer = asked.get_by_role("table").locator("tbody tr")
    expect(answer).to_have_count(2)
    expect(answer.nth(1)).to_contain_text(HOSTILE)
    assert stub.posts() == [("/v2/nodes/gpu%2F01/leave", {"reason": "nodeUnschedulable"})]
    answer.first.get_by_role("link", name="checkpoint").click()
    expect(view.page).to_have_url(f"{stub.base}/#/actions/c1")
    expect(dialog(view)).to_have_count(0)


def test_a_refusal_is_shown_in_the_dialog_and_nothing_typed_is_lost(view: View, stub: Stub) -> None:
    view.allow(QUIETLY)
    stub.nodes = [node("gpu-01")]
    stub.refusals["/v2/checkpoint/pod"] = refusal(
        400,
        "compression",
        "no such compression",
        hint="zstd, zstd:<level>, lz4 or none",
        property="compression",
        found="gzip",
        wanted=["zstd", "none"],
    )
    view.open("#/nodes")
    view.page.get_by_role("button", name="Checkpoint ml/trainer").click()
    asked = dialog(view)
    asked.get_by_label("Compression").fill("gzip")
    asked.get_by_label("Streams").fill("7")
    asked.get_by_role("button", name="Checkpoint").click()
    wrong = asked.get_by_role("alert")
    expect(wrong).to_contain_text("no such compression")
    expect(wrong.locator(".hint")).to_have_text("zstd, zstd:<level>, lz4 or none")
    expect(wrong.locator("dd")).to_have_text(["compression", "gzip", '["zstd","none"]'])
    expect(asked.get_by_label("Compression")).to_have_value("gzip")
    expect(asked.get_by_label("Streams")).to_have_value("7")
    stub.refusals.clear()
    asked.get_by_label("Compression").fill("none")
    asked.get_by_role("button", name="Checkpoint").click()
    expect(view.page).to_have_url(f"{stub.base}/#/actions/new-checkpoint")
    assert [body["overrides"]["compression"] for _, body in stub.posts()] == ["gzip", "none"]
    assert stub.posts()[1][1]["overrides"]["streams"] == 7


def test_streams_out_of_range_are_not_sent(view: View, stub: Stub) -> None:
    stub.nodes = [node("gpu-01")]
    view.open("#/nodes")
    view.page.get_by_role("button", name="Checkpoint ml/trainer").click()
    dialog(view).get_by_label("Streams").fill("65")
    dialog(view).get_by_role("button", name="Checkpoint").click()
    expect(dialog(view).get_by_label("Streams")).to_be_focused()
    assert not dialog(view).get_by_label("Streams").evaluate("(input) => input.checkValidity()")
    assert stub.posts() == []


# --------------------------------------------------------------------------------------------- token


def test_without_a_token_a_form_asks_for_one(view: View, stub: Stub) -> None:
    view.allow(QUIETLY)
    stub.token = "good token/+"
    stub.actions = [action("a1")]
    view.open()
    asked = dialog(view)
    expect(asked).to_contain_text("The API wants a token.")
    asked.get_by_label("Token").fill("wrong")
    asked.get_by_label("Token").press("Enter")
    expect(dialog(view)).to_contain_text("The API does not take this token")
    view.page.keyboard.press("Escape")
    expect(dialog(view)).to_have_count(0)
    view.page.get_by_role("button", name="Enter a token").click()
    dialog(view).get_by_label("Token").fill(stub.token)
    dialog(view).get_by_role("button", name="Go on").click()
    expect(rows(view)).to_have_count(1)
    expect(view.page.locator("#banner")).not_to_contain_text("token", use_inner_text=True)
    view.page.reload()
    expect(rows(view)).to_have_count(1)  # this tab still has it
    assert view.page.evaluate("JSON.stringify(localStorage)") == "{}"


@pytest.mark.parametrize("at_once", [True, False], ids=["opened", "pasted"])
def test_a_token_in_the_fragment_is_taken_over_and_leaves_the_address(view: View, stub: Stub, at_once: bool) -> None:
    view.allow(QUIETLY)
    stub.token = "t0ken+/="
    stub.actions = [action("a1")]
    if at_once:
        view.open("#token=t0ken%2B/%3D")
    else:
        view.open("#/nodes")
        expect(dialog(view)).to_be_visible()
        view.page.keyboard.press("Escape")
        view.page.evaluate("location.hash = 'token=t0ken+/='")
    expect(rows(view)).to_have_count(1)
    assert view.page.url == f"{stub.base}/"
    assert stub.gets("/v2/actions")[-1].authorization == "Bearer t0ken+/="
    if at_once:
        assert all(request.authorization for request in stub.requests)
    view.page.go_back()
    assert "token" not in view.page.url


def test_a_token_that_expires_under_a_dialog_loses_nothing_typed(view: View, stub: Stub) -> None:
    view.allow(QUIETLY)
    stub.nodes = [node("gpu-01")]
    view.open("#/nodes")
    view.page.get_by_role("button", name="Checkpoint ml/trainer").click()
    asked = view.page.get_by_role("dialog", name="Checkpoint ml/trainer")
    asked.get_by_label("Compression").fill("zstd:7")
    stub.token = "fresh"
    asked.get_by_role("button", name="Checkpoint").click()
    door = view.page.get_by_role("dialog", name="Token")
    door.get_by_label("Token").fill("fresh")
    door.get_by_role("button", name="Go on").click()
    expect(door).to_have_count(0)
    expect(asked.get_by_label("Compression")).to_have_value("zstd:7")
    asked.get_by_role("button", name="Checkpoint").click()
    expect(view.page).to_have_url(f"{stub.base}/#/actions/new-checkpoint")


# -------------------------------------------------------------------------------------------- outage


def test_a_server_that_is_away_and_comes_back(view: View, stub: Stub) -> None:
    view.allow(GONE)
    stub.actions = [action("a1")]
    stub.nodes = [node("gpu-01")]
    view.open()
    expect(rows(view)).to_have_count(1)
    stub.stop()
    banner = view.page.locator("#banner")
    expect(banner).to_contain_text(re.compile(r"The API does not answer since \d\d:\d\d:\d\dZ"))
    expect(banner).to_contain_text("What you see is from then.")
    expect(rows(view)).to_have_count(1)
    expect(banner).to_contain_text("next try in 2 s")
    expect(banner).to_contain_text(re.compile(r"next try in [5-8] s"))  # it asks less and less often: after 2, 4 and 8

    stub.actions.insert(0, action("a2"))
    stub.start()
    view.page.get_by_role("button", name="Try now").click()
    expect(rows(view)).to_have_count(2)
    expect(banner.get_by_text("does not answer")).to_be_hidden()
    expect(view.page.locator("#live")).to_have_text("The API answers again.")


def test_a_server_that_comes_back_is_found_by_the_page_itself(view: View, stub: Stub) -> None:
    view.allow(GONE)
    stub.nodes = [node("gpu-01")]
    view.open("#/nodes")
    view.page.get_by_role("button", name="Checkpoint ml/trainer").click()
    stub.stop()
    dialog(view).get_by_role("button", name="Checkpoint").click()
    expect(dialog(view).get_by_role("alert")).to_contain_text("look at the actions before you send it again")
    expect(view.page.locator(".banner.bad")).to_be_visible()
    stub.start()
    expect(view.page.locator(".banner.bad")).to_be_hidden()


def test_a_server_with_a_defect_is_told_as_such(view: View, stub: Stub) -> None:
    view.allow(r"status of 500")
    stub.refusals["/v2/nodes"] = refusal(500, "internal", "a defect")
    view.open("#/nodes")
    expect(view.page.locator("#banner")).to_contain_text("(a defect)")


# ------------------------------------------------------------------------------------------ keyboard


def test_from_the_start_to_a_filed_checkpoint_without_a_mouse(view: View, stub: Stub) -> None:
    stub.nodes = [node("gpu-01")]
    stub.actions = [failed("a1"), action("a0")]
    view.open()
    keyboard, focused = view.page.keyboard, view.page.locator(":focus")
    expect(rows(view)).to_have_count(2)

    def tab_to(name: str) -> None:
        """By Tab alone, and every stop on the way can be seen."""
        for _ in range(40):
            keyboard.press("Tab")
            assert focused.evaluate("(node) => getComputedStyle(node).outlineStyle") != "none"
            if name in (focused.get_attribute("aria-label") or "", (focused.text_content() or "").strip()):
                return
        raise AssertionError(f"Tab never came to {name}")

    keyboard.press("/")
    expect(view.page.get_by_label("Pod")).to_be_focused()
    keyboard.type("g n ?")  # it is typed, not obeyed
    expect(view.page.get_by_label("Pod")).to_have_value("g n ?")
    for _ in range(5):
        keyboard.press("Backspace")
    while not focused.evaluate("(node) => node.matches('tr')"):
        keyboard.press("Tab")
    expect(row(view, "a1")).to_be_focused()
    keyboard.press("ArrowDown")
    expect(row(view, "a0")).to_be_focused()
    keyboard.press("Enter")
    expect(view.page).to_have_url(f"{stub.base}/#/actions/a0")
    expect(view.page.get_by_role("heading", level=1)).to_be_focused()
    view.page.go_back()  # its keys are the browser's own, and a headless one has none
    expect(row(view, "a0")).to_be_focused()  # back where one was

    keyboard.type("gn")
    expect(view.page.get_by_role("heading", name="Nodes")).to_be_focused()
    expect(view.page.get_by_role("heading", name="gpu-01")).to_be_visible()
    tab_to("Checkpoint ml/trainer")
    keyboard.press("Enter")
    expect(dialog(view)).to_be_visible()
    keyboard.press("Escape")
    expect(dialog(view)).to_have_count(0)
    expect(view.page.get_by_role("button", name="Checkpoint ml/trainer")).to_be_focused()
    keyboard.press("Space")
    expect(dialog(view)).to_be_visible()
    while not focused.evaluate("(node) => node.name === 'kill'"):
        keyboard.press("Tab")
    keyboard.press("Space")
    tab_to("Checkpoint")
    keyboard.press("Enter")
    expect(view.page).to_have_url(f"{stub.base}/#/actions/new-checkpoint")
    assert stub.posts()[0][1]["overrides"]["criu_opts"] == '{"leave_running": false}'


def test_shortcuts(view: View) -> None:
    view.open()
    keyboard = view.page.keyboard
    for key, name in {"c": "Checkpoints", "n": "Nodes", "a": "Actions"}.items():
        keyboard.type(f"g{key}")
        expect(view.page.get_by_role("heading", level=1)).to_have_text(name)
        expect(view.page.locator("[aria-current=page]")).to_have_text(name)
    keyboard.press("?")
    expect(dialog(view)).to_contain_text("to the filter")
    keyboard.type("gc")  # not while a dialog is open
    keyboard.press("Escape")
    expect(dialog(view)).to_have_count(0)
    expect(view.page.get_by_role("heading", level=1)).to_have_text("Actions")
    view.page.keyboard.press("Tab")
    view.page.locator("#skip").focus()
    keyboard.press("Enter")
    expect(view.page.locator("main")).to_be_focused()


# ------------------------------------------------------------------------------------------- looking


def furnish(stub: Stub) -> None:
    begun = [event(1, "initialized", 295), event(2, "processing", 295.021)]
    refused = event(3, "error", 0.31, code="tcp_established", message="the workload has 2 TCP connections")
    looked = [{"name": "preflight", "seconds": 0.29, "bytes": 0}]
    unborn: JSON = {"status": "initialized", "progress": None, "provisional": True, "type": "restore", "source_action_id": "a1"}
    going: JSON = {"status": "checkpoint_created", "share": 0.83, "reason": "nodeTermination", "pause_ns": 61_000_000}
    stub.actions = [
        running("a5", events=begun),
        running("a4", pod_name="web-6f7d9c", namespace="prod", node_name="gpu-02", **unborn),
        running("a3", pod_name="inference-0", node_name="gpu-02", **going),
        failed(
            "a2",
            pod_name="etl",
            events=[event(1, "initialized", 0), event(2, "processing", 0.02), refused],
            phases=looked,
            unaccounted=0.02,
        ),
        told(action("a1")),
        told(action("a0", type="restore", source_action_id="a1", reason="nodeUnschedulable", pause_ns=None)),
    ]
    small = action("a7", pod_name="inference-0", raw_bytes=812 * MIB, stored_bytes=120 * MIB)
    stub.checkpoints = [checkpoint(action("a1")), checkpoint(small)]
    long = "registry-7c9d8f6b5d-a-rather-long-name-of-a-pod"
    other = workload(long, kind="pod", namespace="platform", rss=700 * MIB, processes=3)
    stub.nodes = [
        node("gpu-01", actions=2, workloads=[workload("trainer"), other]),
        node("gpu-02", load=61.7, memory_available=20 * GIB, gpus=[], workloads=[]),
        node("gpu-03", alive=False, seen_timestamp="2026-11-28T02:00:00Z", load=None, workloads=[workload("lost", pid=0)]),
    ]


PLACES = {
    "#/actions": "ml/trainer", "#/actions/a5": "shipping", "#/actions/a2": "tcp_established", "#/actions/a1": "committing",
    "#/checkpoints": "ml/trainer", "#/nodes": "gpu-03",
}  # fmt: skip


TEXTS = ":is(h1, h2, p, a, td, th, dt, dd, span, small, time, code, kbd, button, label, legend, pre, input, select):visible"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read(browser: Browser, stub: Stub, dark: bool) -> None:
    def read(texts: Locator, at_least: int) -> None:
        measured = contrasts(texts)
        assert len(measured) >= at_least
        for one in measured:
            assert one.ratio >= 4.5, f"{one.element} has {one.ratio:.2f}"
            assert 'class="primary"' in one.element or (one.ground < 0.1 if dark else one.ground > 0.7), one.element

    furnish(stub)
    with browser.view(stub.base, dark=dark) as view:
        for place, word in PLACES.items():
            view.open(place)
            expect(view.page.locator("main")).to_contain_text(word)
            read(view.page.locator(TEXTS), 40 if place == "#/nodes" else 15)
        view.page.get_by_role("button", name="Checkpoint ml/trainer").click()
        read(dialog(view).locator(TEXTS), 10)


def test_the_theme_is_a_choice_that_stays(view: View, stub: Stub) -> None:
    view.open()
    body, button = view.page.locator("body"), view.page.locator("#theme")
    assert contrasts(body)[0].ground > 0.7
    button.click()
    expect(button).to_have_text("Theme: light")
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert contrasts(body)[0].ground < 0.1
    view.page.reload()
    expect(button).to_have_text("Theme: dark")
    assert contrasts(body)[0].ground < 0.1


@pytest.mark.parametrize("width", [360, 768, 1240, 1280, 2560])
def test_nothing_is_wider_than_the_window(browser: Browser, stub: Stub, width: int) -> None:
    furnish(stub)
    with browser.view(stub.base, width=width) as view:
        for place, word in PLACES.items():
            view.open(place)
            expect(view.page.locator("main")).to_contain_text(word)
            assert view.overflow() <= 0, f"{place} is {view.overflow():.0f} px too wide"
        view.page.get_by_role("button", name="Checkpoint ml/trainer").click()
        assert dialog(view).evaluate("(node) => node.scrollWidth - node.clientWidth") <= 0
        assert view.overflow() <= 0


def test_who_moves_little_sees_nothing_move(browser: Browser, stub: Stub) -> None:
    furnish(stub)
    with browser.view(stub.base) as view:
        view.page.emulate_media(reduced_motion="reduce")
        view.open()
        bar = row(view, "a5").locator(".fill")
        expect(bar).to_have_attribute("width", "40.00%")
        assert bar.evaluate("(node) => getComputedStyle(node).transitionDuration") == "0s"


def test_every_control_has_a_name_and_every_view_its_landmarks(view: View, stub: Stub) -> None:
    furnish(stub)
    for place, word in PLACES.items():
        view.open(place)
        expect(view.page.locator("main")).to_contain_text(word)
        for role in ("banner", "main"):
            expect(view.page.get_by_role(role)).to_have_count(1)
        expect(view.page.get_by_role("navigation", name="Views")).to_be_visible()
        expect(view.page.get_by_role("heading", level=1)).to_have_count(1)
        assert view.page.title().endswith("hibernode")
        nameless = view.page.evaluate(
            """() => [...document.querySelectorAll("input, select, button, a, dialog")]
                .filter((node) => !(node.textContent.trim() || node.getAttribute("aria-label") || node.labels?.length))
                .map((node) => node.outerHTML)"""
        )
        assert nameless == []
        assert view.page.evaluate("[...document.querySelectorAll('th')].every((cell) => cell.scope && cell.textContent.trim())")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_screenshots(browser: Browser, stub: Stub, tmp_path: Path, dark: bool) -> None:
    """For people: of each view, wide and narrow."""
    furnish(stub)
    theme = "dark" if dark else "light"
    names = {
        "#/actions": "actions",
        "#/actions/a5": "running",
        "#/actions/a2": "failed",
        "#/actions/a1": "ready",
        "#/checkpoints": "checkpoints",
        "#/nodes": "nodes",
    }
    for width in (1440, 360):
        with browser.view(stub.base, dark=dark, width=width, height=900) as view:
            for place, name in names.items():
                view.open(place)
                expect(view.page.locator("main")).to_contain_text(PLACES[place])
                assert view.screenshot(f"{name}-{theme}-{width}", tmp_path).stat().st_size > 5_000
            view.page.get_by_role("button", name="Checkpoint ml/trainer").click()
            view.screenshot(f"dialog-{theme}-{width}", tmp_path)
