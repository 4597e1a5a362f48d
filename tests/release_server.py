"""A server that answers as GitHub does: a release's list of files, redirects of renamed owners, limits, downloads."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote


def page_name(name: str) -> str:
    """The name that a release page gives a file, character by character."""
    out = ''
    for c in name:
        c = '.' if c in '[]*' else c
        if not (c == '.' and out.endswith('.')):
            out += c
    return out


class ReleaseServer(ThreadingHTTPServer):
    """`files` by repository and page name. The attributes below make it misbehave.

    Attributes:
        renamed: Owner -> its new name, to which its URLs are redirected.
        digests: Whether the list gives SHA-256, as for new files.
        list_status: Status of the list, such as 403.
        list_headers: More headers of the list.
        list_body: Answer to a request for the list, in place of the list.
        break_after: The next download breaks off after so many bytes.
        sizes: Sizes in the list that are not the files'.
        asked: (path, Authorization, Range) of each request.
    """

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.renamed: dict[str, str] = {}
        self.digests = False
        self.list_status = 200
        self.list_headers: dict[str, str] = {}
        self.list_body: bytes | None = None
        self.break_after: int | None = None
        self.sizes: dict[str, int] = {}
        self.asked: list[tuple[str, str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_address[1]}'

    def put(self, name: str, content: bytes, repository: str = 'pvti/NORTON') -> str:
        """Upload a file; its name on the page."""
        self.files.setdefault(repository, {})[page_name(name)] = content
        return page_name(name)

    def count(self, what: str) -> int:
        """Requests whose path holds `what`."""
        return sum(what in path for path, _, _ in self.asked)

    def listing(self, repository: str) -> bytes:
        rows = [
            {
                'name': name,
                'size': self.sizes.get(name, len(content)),
                'browser_download_url': f'{self.url}/{repository}/releases/download/v0.1.0/{quote(name)}',
                'digest': f'sha256:{hashlib.sha256(content).hexdigest()}' if self.digests else None,
                'state': 'uploaded',
            }
            for name, content in self.files[repository].items()
        ]
        return json.dumps({'tag_name': 'v0.1.0', 'assets': rows}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: ReleaseServer

    def do_GET(self) -> None:
        server, path = self.server, unquote(self.path)
        server.asked.append((path, self.headers.get('Authorization'), self.headers.get('Range')))
        parts = path.strip('/').split('/')
        is_list = parts[0] == 'repos'
        owner, name = parts[1:3] if is_list else parts[:2]
        if owner in server.renamed:
            self.answer(301, b'', Location=quote(path.replace(f'/{owner}/', f'/{server.renamed[owner]}/', 1)))
        elif f'{owner}/{name}' not in server.files or (is_list and parts[3:] != ['releases', 'tags', 'v0.1.0']):
            self.answer(404, b'{"message": "Not Found"}')
        elif is_list:
            body = server.listing(f'{owner}/{name}') if server.list_body is None else server.list_body
            self.answer(server.list_status, body, **server.list_headers)
        else:
            self.download(server.files[f'{owner}/{name}'].get(parts[-1]))

    def download(self, content: bytes | None) -> None:
        if content is None:
            return self.answer(404, b'')
        etag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        wanted, status = self.headers.get('Range'), 200
        if wanted and self.headers.get('If-Range') == etag:
            content, status = content[int(wanted.removeprefix('bytes=').rstrip('-')) :], 206
        cut, self.server.break_after = self.server.break_after, None
        self.answer(status, content, cut, ETag=etag)

    def answer(self, status: int, body: bytes, cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(key.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[ReleaseServer]:
    with ReleaseServer() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()
