"""The demo as a web page: live annotated picture, FPS and latency charts, model and threshold to choose.

One WebSocket carries the picture of the server's source, another sends the browser's own camera through the model.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Callable
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from detection.demo.studio import Snapshot, Studio
from detection.visual import RateMeter

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect
except ImportError as error:
    raise ValueError(
        f'the web page needs starlette, uvicorn and websockets ({error}): pip install -e ".[web]"'
    ) from error

_LARGEST_MESSAGE = 8 * 2**20  # bytes; a browser's camera picture has a few 100 KB
_LARGEST_SETTINGS = 10_000  # characters
_REFUSED = 4403  # WebSocket close code
_HEADERS = {
    'Cache-Control': 'no-store',
    # no other page may frame this one, or learn its address and with it the token
    'Content-Security-Policy': "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self' ws: wss:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    'X-Frame-Options': 'DENY',
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',
}


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach the address."""
    if host == 'localhost':
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build_app(studio: Studio, *, token: str | None = None) -> Starlette:
    """The page and its two WebSockets.

    Args:
        studio: what runs the models; started and closed by the caller.
        token: when given, every request must carry ``?token=...``. Without one only requests that name this machine
            by a loopback address are answered, so that a foreign page cannot reach the server by DNS rebinding.
    """

    def allowed(connection: HTTPConnection) -> bool:
        host = connection.headers.get('host', '')
        origin = connection.headers.get('origin')
        if origin is not None and urlsplit(origin).netloc != host:
            return False
        if token is None:
            return is_loopback(urlsplit(f'//{host}').hostname or '')
        return hmac.compare_digest(connection.query_params.get('token', '').encode(), token.encode())

    async def page(request: Request) -> Response:
        if not allowed(request):
            return PlainTextResponse('403: open the address with the token that the server printed', 403)
        html = resources.files('detection.demo').joinpath('web/index.html').read_text(encoding='utf-8')
        return HTMLResponse(html, headers=_HEADERS)

    async def watch(peer: WebSocket) -> None:
        """Sends facts, then statistics and JPEG in turn; a slow viewer misses pictures, but gets no old ones."""
        await peer.accept()
        if not allowed(peer):
            await peer.close(_REFUSED)
            return
        studio.watch(+1)
        settings = asyncio.create_task(_receive_settings(peer, studio))
        try:
            await peer.send_json(studio.facts())
            number = 0
            while not settings.done():
                snapshot = await asyncio.to_thread(studio.wait, number)
                if snapshot is not None:
                    number = snapshot.number
                    await _send(peer, snapshot)
        except RuntimeError as error:  # the picture stopped, or the viewer left while it was sent
            await _try_send(peer, {'error': str(error)})
        except WebSocketDisconnect:
            pass
        finally:
            settings.cancel()
            studio.watch(-1)

    async def camera(peer: WebSocket) -> None:
        """Receives JPEGs of the browser's camera, answers each with statistics and the annotated JPEG."""
        await peer.accept()
        if not allowed(peer):
            await peer.close(_REFUSED)
            return
        meter = RateMeter(window=20)
        try:
            while True:
                data = await peer.receive_bytes()
                try:
                    await _send(peer, await asyncio.to_thread(studio.process_jpeg, data, meter))
                except ValueError as error:
                    await peer.send_json({'error': str(error)})
        except (WebSocketDisconnect, KeyError):  # KeyError: a text message
            pass

    routes = [Route('/', page), WebSocketRoute('/watch', watch), WebSocketRoute('/camera', camera)]
    return Starlette(routes=routes)


def run_server(studio: Studio, host: str, port: int, announce: Callable[[str], object]) -> None:
    """See :func:`detection.demo.serve.serve`."""
    token = None if is_loopback(host) else secrets.token_urlsafe(16)
    try:
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        studio.close()
        raise ValueError(f'cannot serve at {host} port {port}: {error.strerror or error}') from error
    config = uvicorn.Config(
        build_app(studio, token=token),
        log_level='warning',
        ws_max_size=_LARGEST_MESSAGE,
        timeout_graceful_shutdown=3,
    )
    studio.start()
    try:
        shown = f'[{host}]' if ':' in host else host
        announce(f'http://{shown}:{port}/' + (f'?token={token}' if token else ''))
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
        studio.close()


def read_settings(text: str) -> dict[str, Any]:
    """The settings in a message of the page; ``ValueError`` for anything but a small JSON object."""
    if len(text) > _LARGEST_SETTINGS:
        raise ValueError(f'{len(text)} characters, expected an object of at most {_LARGEST_SETTINGS}')
    try:
        settings = json.loads(text)
    except RecursionError:
        raise ValueError('too many levels, expected an object') from None
    if not isinstance(settings, dict):
        raise ValueError(f'{text[:80]}, expected an object')
    return settings


async def _receive_settings(peer: WebSocket, studio: Studio) -> None:
    while True:
        try:
            await asyncio.to_thread(studio.choose, read_settings(await peer.receive_text()))
            await peer.send_json(studio.facts())
        except ValueError as error:
            await peer.send_json({'error': str(error)})
        except (WebSocketDisconnect, KeyError):  # KeyError: a binary message
            return


async def _send(peer: WebSocket, snapshot: Snapshot) -> None:
    await peer.send_json(snapshot.stats)
    await peer.send_bytes(snapshot.jpeg)


async def _try_send(peer: WebSocket, message: dict[str, Any]) -> None:
    try:
        await peer.send_json(message)
        await peer.close()
    except (RuntimeError, WebSocketDisconnect):
        return
