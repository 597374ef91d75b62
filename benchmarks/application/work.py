"""The work of every program that is compared: a line with the time, the process and the version it runs.

What imports this has paid for psycopg and prometheus_client, and has noted its start.
"""

import os
import time

import parts
import prometheus_client  # noqa: F401 -- what a service of this kind imports
import psycopg  # noqa: F401
import version

PAUSE_SECONDS = float(os.environ.get("BENCH_PAUSE_SECONDS", "0.001"))
OUT = os.open(os.environ["BENCH_LINES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(what: str) -> None:
    os.write(OUT, f"{time.monotonic_ns()} {os.getpid()} {what}\n".encode())


def step() -> None:
    note(f"{version.number()} {parts.digits()}")


def serve() -> None:
    while True:
        step()
        time.sleep(PAUSE_SECONDS)


note("start")
