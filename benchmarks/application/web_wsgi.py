"""The program for a WSGI server: a thread does the work."""

import threading

import work

threading.Thread(target=work.serve, daemon=True).start()


def application(_environ, start_response):  # noqa: ANN001, ANN201 -- WSGI
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok\n"]
