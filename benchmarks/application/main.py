"""The program for what runs a program: it serves in its main thread until it is asked to stop."""

import os
import signal
import socket
import sys

import work


def stop(*_: object) -> None:
    sys.exit(0)


def tell_ready() -> None:
    """Tell whoever waits for it, as under systemd."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", address)


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    work.step()
    tell_ready()
    work.serve()


if __name__ == "__main__":
    main()
