"""The web page's entry: its packages are the extra `web`, and are imported when the page is asked for."""

from __future__ import annotations

from collections.abc import Callable

from detection.demo.studio import Studio


def serve(studio: Studio, host: str, port: int, announce: Callable[[str], object]) -> None:
    """Serve until Ctrl-C; the studio is closed at the end.

    Args:
        studio: not yet started.
        host: address to bind to. Other than a loopback address, requests need a token.
        port: TCP port.
        announce: is told the page's address, with the token if there is one.

    Raises:
        ValueError: the port is taken, the address is not one of this machine's, or the extra `web` is not installed.
    """
    try:
        from detection.demo.server import run_server
    except ValueError:
        studio.close()
        raise
    run_server(studio, host, port, announce)
