"""The program for an ASGI server: a thread does the work."""

import threading

import work

threading.Thread(target=work.serve, daemon=True).start()


async def application(scope, _receive, send):  # noqa: ANN001, ANN201 -- ASGI
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok\n"})
