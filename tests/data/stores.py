"""A real S3 server on this machine, and a proxy before it that breaks what passes, as networks and stores do."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

KEY, SECRET = "AKIATESTKEY", "a-secret-that-no-file-may-hold"
FAULTS = ("truncate", "flip", "reset", "error")


@dataclass
class Faults:
    """What the proxy breaks: of the replies to GET requests for tars, `share`, `most` in all."""

    share: float = 0.0
    most: int = 0
    kinds: tuple[str, ...] = FAULTS
    seed: int = 0
    latency: float = 0.0
    bytes_per_s: float = 0.0
    everything: bool = False
    """Break replies for other files too."""
    injected: dict[str, int] = field(default_factory=dict)
    requests: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._mutex = threading.Lock()
        self._free_at = 0.0
        self._flips: dict[tuple[str, str], int] = {}

    def next(self, path: str, part: str) -> str | None:
        """The fault of this request; of the same bytes two in a row are flipped at most, since three are a verdict."""
        with self._mutex:
            self.requests += 1
            if sum(self.injected.values()) >= self.most or self._random.random() >= self.share:
                return None
            if not (self.everything or path.endswith((".tar", ".index"))):
                return None
            kind = self._random.choice(self.kinds)
            if kind == "flip":
                self._flips[path, part] = self._flips.get((path, part), 0) + 1
                if self._flips[path, part] > 2:
                    return None
            self.injected[kind] = self.injected.get(kind, 0) + 1
            return kind

    def pace(self, size: int) -> None:
        """Wait as a line of so many bytes a second, shared by all connections, makes one wait."""
        with self._mutex:
            self._free_at = max(self._free_at, time.monotonic()) + size / self.bytes_per_s
            wait = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait))


@contextlib.contextmanager
def proxy(port: int, faults: Faults, *, authority: trustme.CA | None = None) -> Iterator[str]:
    """The URL of a proxy to the server at `port`: https, if an authority signs its certificate."""
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            kind = faults.next(self.path.partition("?")[0], self.headers.get("Range", ""))
            time.sleep(faults.latency)
            if kind == "error":
                self.send_error(503, "Slow Down")
                return
            if kind == "stall":
                closing.wait(30.0)
                return
            upstream = http.client.HTTPConnection("127.0.0.1", port)
            upstream.request(self.command, self.path, headers=dict(self.headers.items()))
            reply = upstream.getresponse()
            content = bytearray(reply.read())
            upstream.close()
            if kind == "flip" and content:
                content[len(content) // 2] ^= 1
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("connection", "date", "server", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = reply.headers.get("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.close_connection = True
                return
            if kind == "truncate":
                content = content[: len(content) // 2]
                self.close_connection = True
            if faults.bytes_per_s:
                for start in range(0, len(content), 1 << 18):
                    faults.pace(len(content[start : start + (1 << 18)]))
                    self.wfile.write(content[start : start + (1 << 18)])
            else:
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was cut off, or hung up: what this proxy is for

    server = Server(("127.0.0.1", 0), Handler)
    if authority is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"{'https' if authority else 'http'}://127.0.0.1:{server.server_address[1]}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


# moto copies the whole object to answer for a part of it: 20 ms for a shard of 34 MB, which no store takes. Here it
# gives the object itself, of which the part is taken.
_SERVER = """
import sys
from moto.s3.models import FakeKey
from moto.server import ThreadedMotoServer

def value(key, read=FakeKey.value.fget):
    if len(getattr(key, "content", b"")) != key.contentsize:
        key.content = read(key)
    return key.content

FakeKey.value = property(value, FakeKey.value.fset)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of an S3 server (moto's) on the loopback interface, in a process that ends with this one."""
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate()


def _client(port: int):  # type: ignore[no-untyped-def]
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


def allow_anyone(port: int, bucket: str) -> None:
    """Let a bucket's files be read by plain HTTP, without credentials."""
    allowed = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
    client = _client(port)
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [allowed]}))
    client.close()


def upload(port: int, folder: Path, bucket: str, prefix: str) -> None:
    """Copy a folder's files to the server."""
    client = _client(port)
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=bucket)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    client.close()


def use_server(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Have this process's S3 clients speak to `endpoint`, with the test's credentials."""
    values = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def gs_server(monkeypatch: pytest.MonkeyPatch, folder: Path, bucket: str, prefix: str) -> Iterator[None]:
    """A Google Cloud Storage (its emulator) on the loopback interface, with a folder's files, for this process."""
    import gcsfs
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    try:
        assert server._api._httpd is not None
        port = server._api._httpd.server_address[1]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asked for by gRPC, which it does not speak
        gcsfs.GCSFileSystem.clear_instance_cache()
        gcsfs.GCSFileSystem().put(f"{folder}/", f"{bucket}/{prefix}/", recursive=True)
        yield
    finally:
        server.stop()
        gcsfs.GCSFileSystem.clear_instance_cache()
