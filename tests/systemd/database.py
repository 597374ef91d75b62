"""The database of the machine: `python database.py FOLDER`, as a unit of type notify."""

import signal
import sys
from pathlib import Path

from sdnotify import SystemdNotifier

from monitor.embedded import EmbeddedPostgres

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with EmbeddedPostgres(Path(sys.argv[1]), durable=False):
        SystemdNotifier().notify("READY=1")
        while True:
            signal.pause()
