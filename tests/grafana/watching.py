"""A real Prometheus, a real Alertmanager and a webhook, configured by the files that we hand out."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from monitor.owned import owned
from tests.grafana.environment import GRAFANA
from tests.supervisor.harness import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMETHEUS = shutil.which("prometheus")
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
_ANSWER_SECONDS = 10


class Webhook:
    """Takes what Alertmanager sends."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        """Each alert as it was sent, with `received`: when."""
        self._came = threading.Condition()

    def take(self, message: dict[str, Any]) -> None:
        """Keep the alerts of one message."""
        with self._came:
            self.alerts += [alert | {"received": time.time()} for alert in message["alerts"]]
            self._came.notify_all()

    def wait(self, name: str, status: str, limit_seconds: float, **labels: str) -> dict[str, Any]:
        """Return the first alert of that name and status once it has come."""

        def seen() -> dict[str, Any] | None:
            wanted = {"alertname": name, **labels}.items()
            for alert in self.alerts:
                if alert["status"] == status and wanted <= alert["labels"].items():
                    return alert
            return None

        with self._came:
            assert self._came.wait_for(seen, limit_seconds), f"{name} was not {status}: {self.alerts}"
            found = seen()
        assert found is not None
        return found


class Prometheus:
    """Asks a running Prometheus."""

    def __init__(self, port: int, targets: Path) -> None:
        self._port = port
        self._targets = targets

    def scrape(self, address: str) -> None:
        """Scrape this supervisor from now on; Prometheus notices the file."""
        aside = self._targets.with_suffix(".new")
        aside.write_text(json.dumps([{"targets": [address]}]), encoding="utf-8")
        aside.rename(self._targets)

    def now(self, query: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the series of an instant query."""
        return self._series("query", query=query, time=at or time.time())

    def over(self, query: str, start: float, end: float, step_seconds: float) -> list[dict[str, Any]]:
        """Return the series of a range query."""
        return self._series("query_range", query=query, start=start, end=end, step=step_seconds)

    def values(self, label: str, series: str, start: float, end: float) -> set[str]:
        """Return the values of a label, as Grafana asks for those of a variable."""
        found = self._get(f"label/{label}/values", **{"match[]": series, "start": start, "end": end})
        return set(found)

    def _series(self, what: str, **parameters: object) -> list[dict[str, Any]]:
        answer = self._get(what, **parameters)
        result: list[dict[str, Any]] = answer["result"]
        return result

    def _get(self, what: str, **parameters: object) -> Any:
        address = f"http://127.0.0.1:{self._port}/api/v1/{what}?{urlencode(parameters)}"
        with urlopen(address, timeout=_ANSWER_SECONDS) as answer:
            document = json.load(answer)
        assert document["status"] == "success", document
        return document["data"]


@contextmanager
def watching(folder: Path, *, scrape_seconds: int | None = None) -> Iterator[tuple[Prometheus, Webhook]]:
    """Run them on our configuration; only addresses differ, and the scrape interval if one is given."""
    assert PROMETHEUS is not None
    assert ALERTMANAGER is not None
    targets = folder / "targets.json"
    with _webhook() as (webhook, webhook_port):
        manager_port, port = free_port(), free_port()
        manager = _read("alertmanager.yml")
        manager["receivers"][0]["webhook_configs"][0]["url"] = f"http://127.0.0.1:{webhook_port}/"
        config = _read("prometheus.yml")
        config["rule_files"] = [str(GRAFANA / "prometheus" / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        del job["static_configs"]
        job["file_sd_configs"] = [{"files": [str(targets)]}]
        (managers,) = config["alerting"]["alertmanagers"]
        managers["static_configs"] = [{"targets": [f"127.0.0.1:{manager_port}"]}]
        if scrape_seconds is not None:
            config["global"] = dict.fromkeys(config["global"], f"{scrape_seconds}s")
        alertmanager_command = [
            ALERTMANAGER,
            f"--config.file={_write(folder / 'alertmanager.yml', manager)}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{manager_port}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]
        prometheus_command = [
            PROMETHEUS,
            f"--config.file={_write(folder / 'prometheus.yml', config)}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        with (
            _running(alertmanager_command, folder / "alertmanager.log", manager_port),
            _running(prometheus_command, folder / "prometheus.log", port),
        ):
            yield Prometheus(port, targets), webhook


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((GRAFANA / "prometheus" / name).read_text(encoding="utf-8"))
    return document


def _write(path: Path, document: object) -> Path:
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def free_port() -> int:
    """Return a port that nobody listens on; neither program tells which one it got if asked for any."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextmanager
def _webhook() -> Iterator[tuple[Webhook, int]]:
    webhook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            webhook.take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield webhook, server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def _running(command: list[str], log: Path, port: int) -> Iterator[None]:
    with log.open("ab") as written:
        process = subprocess.Popen(
            owned(command, death_signal=signal.SIGKILL),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
        )
    try:
        until(_ready(process, port, log))
        yield
    finally:
        process.terminate()
        process.wait()


def _ready(process: subprocess.Popen[bytes], port: int, log: Path) -> Callable[[], bool]:
    def answers() -> bool:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            with urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=_ANSWER_SECONDS) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    return answers
