"""The status page in a real browser: what it says, how it follows, and who can read it.

Run by `make page`. With ``WA_SCREENSHOTS=1`` the pictures in ``docs/`` are taken anew.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from monitor.demo import incident
from monitor.demo.bridge import MAPPED_LIDS, NORTHFIELD, UNMAPPED_LID
from monitor.demo.stage import Stage
from monitor.demo.stream import Stream
from tests.supervisor.harness import DEADLINE_SECONDS, Supervised, until

browsers = pytest.importorskip(
    "playwright.sync_api", reason="looked at by `make page`, which has a browser", exc_type=ImportError
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt-get install chromium)"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

ROOT = Path(__file__).parents[2]
ACCESSIBLE = Path(__file__).with_name("accessible.js").read_text(encoding="utf-8")
DEADLINE_MS = DEADLINE_SECONDS * 1000
OPTIONS = (
    *("--type", "notify", "--handover", "overlap"),
    *("--show-metric", "wa_monitor_drops_stored_total{project,identity}", "--alarm", "wa_monitor_lid_rows"),
)
MESSAGES = 60
WIDE, PHONE = {"width": 1100, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with browsers.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open pages; whatever a browser complains about while one is open fails the test."""
    complaints: list[str] = []

    def refuse(dialog: Any) -> None:
        complaints.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    contexts = []

    def open_(address: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(DEADLINE_MS)
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", refuse)
        page.on("request", lambda asked: complaints.append(asked.url) if address not in asked.url else None)
        page.goto(f"http://{address}/", wait_until="domcontentloaded")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """The demo: an invented bridge, a real monitor below a real supervisor."""
    with tempfile.TemporaryDirectory(prefix="wa-monitor-") as folder, Stage(Path(folder) / "demo") as built:
        built.bridge.map_lid(*UNMAPPED_LID)  # What the fault stores of him could not be repaired else.
        Stream(built.bridge, seed=7, rate=1.0, first_drop=1_000_001).post(MESSAGES)
        built.supervise("monitor.app:main", options=OPTIONS)
        yield built


@contextmanager
def edited(path: Path, content: bytes) -> Iterator[None]:
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(good)


def text(page: Any, section: str) -> str:
    return " ".join(page.locator(f"#{section}").inner_text().split())


def wait(page: Any, section: str, pattern: str) -> None:
    """Wait until a section says something; the page is not loaded again for it."""
    said: list[str] = [""]

    def says() -> bool:
        said[0] = text(page, section)
        return re.search(pattern, said[0]) is not None

    try:
        until(says)
    except AssertionError:
        pytest.fail(f"{section} does not say {pattern!r} but: {said[0]}")


def picture(page: Any, name: str) -> None:
    """Take a picture for the documents, if that is asked for."""
    taken = page.screenshot(animations="disabled")
    assert taken.startswith(b"\x89PNG")
    if os.environ.get("WA_SCREENSHOTS") == "1":
        (ROOT / "docs" / f"status-page-{name}.png").write_bytes(taken)


def is_sound(page: Any) -> None:
    assert page.evaluate(ACCESSIBLE) == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, (
        "it is wider than the screen"
    )


def test_page_says_what_runs_whether_it_is_proven_and_what_the_service_counts(
    stage: Stage, opened: Callable[..., Any]
) -> None:
    stage.bridge.post(chat_jid=NORTHFIELD, sender=MAPPED_LIDS[0][0], content="DR7000009 done")
    page = opened(stage.address)
    wait(page, "link", "^Live$")
    wait(page, "headline", r"In sync")
    status = stage.status()
    assert f"Generation {status['live']['generation']} serves tree {status['live']['tree'][:12]}" in text(
        page, "headline"
    )
    wait(page, "alarms", "No alarm")
    wait(page, "counts", "by identity")
    assert page.locator("#counts tbody tr").count() == 2, "a row for each project that is enabled"
    wait(page, "reloads", r"✓ live by start, generation 1, \d+ ms")
    assert "launch" in page.locator("svg.timeline").first.get_attribute("aria-label")
    wait(page, "modules", r"\d+ match; \d+ pieces of code in memory compared")
    page.locator("#modules summary").click()
    assert "monitor.identity" in text(page, "modules")
    page.locator("#modules summary").click()
    wait(page, "watcher", "watcher (events|partial|polling)")
    is_sound(page)
    page.evaluate("scrollTo(0, 0)")
    picture(page, "in-sync")


def test_rejected_reload_and_standing_lids_show_without_loading_the_page_again(
    stage: Stage, opened: Callable[..., Any]
) -> None:
    page = opened(stage.address)
    phone = opened(stage.address, viewport=PHONE, color_scheme="dark", is_mobile=True, has_touch=True)
    page.evaluate("window.same = true")
    wait(page, "headline", "✓ In sync")
    identity = stage.tree / "monitor" / "identity.py"
    good, generation = identity.read_bytes(), stage.status()["live"]["generation"]
    incident.overwrite(identity, incident.with_bug(good))
    wait(page, "generations", f"live {generation + 1} ")
    stage.bridge.post(chat_jid=NORTHFIELD, sender=MAPPED_LIDS[0][0], content="DR7000001 done")
    wait(
        page,
        "alarms",
        r"✗ Rows of the table that hold a LID .*: 1 \(wa_monitor_lid_rows, project Northfield\)",
    )
    assert "1 alarm," in page.title()
    with edited(stage.tree / "monitor" / "relay.py", b"def broken(:\n"):
        for shown in (page, phone):
            wait(shown, "headline", r"✗ Not in sync .*relay\.py")
            wait(shown, "reloads", r"✗ rejected \(syntax\) by (watch|scan)")
            wait(shown, "alarms", "wa_monitor_lid_rows")
            is_sound(shown)
        assert text(page, "modules").count("outdated") == 2, "in the sum and in the row of the module"
        assert page.evaluate("window.same")
        picture(page, "rejected")
        picture(phone, "dark-390")
        widest = (
            "Math.max(...[...document.querySelectorAll('caption')].map(c => c.getBoundingClientRect().right))"
        )
        assert phone.evaluate(widest) <= PHONE["width"], "what a table is about can be read without scrolling"
        assert phone.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    identity.write_bytes(good)
    wait(page, "headline", "✓ In sync")
    assert stage.command("wa-monitor", "repair-lids").returncode == 0
    wait(page, "alarms", "No alarm")


def test_page_is_complete_without_javascript(stage: Stage, opened: Callable[..., Any]) -> None:
    stage.wait("in sync", lambda: stage.status()["in_sync"])
    page = opened(stage.address, java_script_enabled=False, viewport=PHONE)
    assert "In sync" in text(page, "headline")
    assert "load it again" in text(page, "link")
    for section, said in {
        "alarms": "No alarm",
        "counts": "Northfield",
        "generations": "live",
        "reloads": "by start",
        "modules": "match",
        "watcher": "directories",
    }.items():
        assert re.search(said, text(page, section)), section


def test_page_is_read_by_keyboard_and_what_was_opened_stays_open(
    stage: Stage, opened: Callable[..., Any]
) -> None:
    page = opened(stage.address)
    wait(page, "link", "^Live$")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the status"
    summary = page.locator("#modules summary")
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("#modules details").get_attribute("open") is not None
    file = stage.tree / "monitor" / "relay.py"
    before = stage.status()["live"]["generation"]
    file.write_bytes(file.read_bytes() + b"# edited\n")
    wait(page, "generations", f"live {before + 1}")
    stage.wait("proven", lambda: stage.status()["in_sync"])
    assert page.locator("#modules details").get_attribute("open") is not None
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


LIVE = r"reload \(\w+\): live"
HOSTILE = "<img src=x onerror=alert(1)>"
SPEAKS = f"""\
import os, socket, time
import prometheus_client
import prose

gauge = prometheus_client.Gauge("jobs", "<script>alert(2)</script>", ["queue"])
gauge.labels("{HOSTILE}").set(1)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1\\nSTATUS={HOSTILE}'\\"&amp;", os.environ["NOTIFY_SOCKET"])
while True:
    time.sleep(60)
"""


def test_what_a_child_and_a_tree_say_is_text(
    supervise: Callable[..., Supervised], tmp_path: Path, opened: Callable[..., Any]
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "main.py").write_text(SPEAKS, encoding="utf-8")
    (tree / "prose.py").write_text("", encoding="utf-8")
    started = supervise("--type=notify", "--show-metric=jobs", "--alarm=jobs", "main.py", cwd=tree)
    started.expect(LIVE)
    page = opened(started.status()["listen"])
    wait(page, "headline", re.escape(f"{HOSTILE}'\"&amp;"))
    wait(page, "alarms", re.escape("<script>alert(2)</script>"))
    wait(page, "counts", re.escape(HOSTILE))
    (tree / f"{HOSTILE.replace('/', '')}.py").write_text("not Python(\n", encoding="utf-8")
    wait(page, "reloads", re.escape(HOSTILE))
    wait(page, "headline", "Not in sync")
    assert page.locator("img").count() == 0
    is_sound(page)


def test_page_says_that_what_it_shows_is_old_when_nobody_answers(
    supervise: Callable[..., Supervised], tree: Path, browser: Any
) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    page = browser.new_page()
    page.goto(f"http://{started.status()['listen']}/", wait_until="domcontentloaded")
    wait(page, "link", "^Live$")
    started.end()
    wait(page, "link", "Not connected: what is shown may be old")
    page.close()
