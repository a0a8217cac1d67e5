"""Servers on this machine that tests read shards from: object storage as moto plays it, and HTTP good and bad."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOST = "127.0.0.1"


@dataclass
class Http:
    """An HTTP server of a folder, and how it behaves; tests change the fields while it runs.

    Attributes:
        url: of the folder.
        ranges: whether it gives parts of files.
        fault: called with the name of a file before it is given; answers None to give it, or what to do instead:
            a status, "hang", "truncate" (half of what was asked for), or "close".
        requests: method, name and Range of every request.
    """

    url: str
    ranges: bool = True
    fault: Callable[[str], int | str | None] = lambda name: None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, http: list[Http], *args: object) -> None:
        self._folder, self._http = folder, http
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        http, name = self._http[0], self.path.partition("?")[0].rpartition("/")[2]
        asked = self.headers.get("Range")
        http.requests.append((self.command, name, asked))
        what = http.fault(name)
        file = self._folder / name
        if what is None and not file.is_file():
            what = 404
        if isinstance(what, int):
            self._head(what, 0)
            return
        if what == "hang":
            time.sleep(5)
            self.close_connection = True
            return
        content = file.read_bytes()
        status, start, end = 200, 0, len(content)
        if asked and http.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(content))
            if start >= len(content):
                self._head(416, 0)
                return
            status = 206
        self._head(status, end - start)
        if self.command == "HEAD":
            return
        if what == "truncate":
            self.close_connection = True
            end = (start + end) // 2
        if what == "close":
            self.close_connection = True
            end = start
        self.wfile.write(content[start:end])

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if self._http[0].ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that goes away is none."""


@contextmanager
def http_server(folder: Path) -> Iterator[Http]:
    """Serve a folder on a free port."""
    found: list[Http] = []
    server = _Server((HOST, 0), partial(_Handler, folder, found))
    found.append(Http(f"http://{HOST}:{server.server_port}/set"))
    thread = threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True)
    thread.start()
    try:
        yield found[0]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_server() -> Iterator[str]:
    """An empty S3 on a free port; gives its endpoint."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def upload(folder: Path, endpoint: str, bucket: str, prefix: str) -> str:
    """Put the files of a folder into a bucket; gives their URL."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    for file in sorted(folder.iterdir()):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
    return f"s3://{bucket}/{prefix}"
