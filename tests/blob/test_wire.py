import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from gigatome.blob import fetch, wire
from gigatome.blob.fetch import Fetcher
from gigatome.blob.remote import RemoteOptions
from gigatome.blob.store import open_blob
from gigatome.blob.wire import Wire
from gigatome.core.errors import StoreError
from range_server import serve

DATA = bytes(range(256)) * 2000
QUICK = RemoteOptions(connect_seconds=2, stall_seconds=0.2, retries=1)
RIGHT = "HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nContent-Range: bytes 70000-70009/512000\r\n"
BODY = DATA[70_000:70_010]


@pytest.fixture
def server():
    with serve({"a.bin": DATA, "dir/a b%c.bin": DATA}) as running:
        yield running


@pytest.fixture
def bucket(server, monkeypatch):
    """The server stands for S3."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "TOPSECRET",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server.files["bucket/a b.svs"] = DATA


@pytest.fixture
def without_obstore(monkeypatch):
    """Fails a fetcher that goes to obstore for ranges."""

    async def refuse(*_, **__):
        raise AssertionError("asked through obstore")

    monkeypatch.setattr(fetch.obstore, "get_ranges_async", refuse)


def read(blob, times=1):
    """Ten bytes of the blob as the wire brings them the last of some times, or None."""

    async def work():
        lines = Wire()
        for _ in range(times):
            (bodies,) = await lines.read([(blob, [70_000], [10])])
        lines.close()
        return bodies and bytes(bodies[0])

    return asyncio.run(asyncio.wait_for(work(), 20))


def fetch_one(blob, start, length):
    with Fetcher() as fetcher:
        (result,) = fetcher.fetch([(blob, [(start, length)])]).result(30)
    if isinstance(result, StoreError):
        raise result
    return result


@contextlib.contextmanager
def answering(*answers):
    """The port of a server that answers on its connections, one after another, with one of these; "close" closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def work():
        for answer in answers:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                while connection.recv(65_536):
                    for part in answer:
                        connection.sendall(part)
                    if b"close" in b"".join(answer):
                        break

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.close()


def at(blob, port, monkeypatch):
    """The blob as if the server on ``port`` had it."""
    return replace_url(blob, f"http://127.0.0.1:{port}/a.bin", monkeypatch)


def replace_url(blob, url, monkeypatch):
    monkeypatch.setattr(blob, "url", url)
    return blob


def test_a_fetcher_asks_on_few_connections_and_not_through_obstore(server, without_obstore):
    blob = open_blob(f"{server.url}/dir/a%20b%25c.bin?signature=a%2Fb%3D&x=1")
    before = server.connections
    with Fetcher(in_flight=8) as fetcher:
        wanted = [(blob, [(70_000 + 1000 * k, 500), (300_000 + 700 * k, 600)]) for k in range(100)]
        for result, (_, ranges) in zip(fetcher.fetch(wanted).result(30), wanted, strict=True):
            assert result == [DATA[offset : offset + length] for offset, length in ranges]
    assert {path for path, _ in server.requests} == {"/dir/a%20b%25c.bin?signature=a%2Fb%3D&x=1"}
    assert server.connections - before <= 8


def test_a_bucket_is_read_at_a_signed_address(server, bucket, without_obstore):
    blob = open_blob("s3://bucket/a b.svs")
    assert fetch_one(blob, 70_000, 10) == [BODY]
    path = server.requests[-1][0]
    assert path.startswith("/bucket/a%20b.svs?X-Amz-")
    assert "X-Amz-Signature=" in path
    assert "TOPSECRET" not in path


def test_what_needs_more_than_a_connection_is_left_to_obstore(server, monkeypatch):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.com")
    assert read(blob) is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read(blob) == BODY
    named = replace_url(blob, f"http://name:password@{server.url.removeprefix('http://')}/a.bin", monkeypatch)
    assert read(named) is None


@pytest.mark.parametrize("setting", ["AWS_ALLOW_INVALID_CERTIFICATES", "AWS_PROXY_CA_CERTIFICATE"])
def test_a_bucket_with_settings_of_its_own_is_left_to_obstore(server, bucket, monkeypatch, setting):
    monkeypatch.setenv(setting, "")
    assert read(open_blob("s3://bucket/a b.svs", QUICK)) is None


def test_a_bucket_without_a_signature_is_left_to_obstore(bucket, monkeypatch):
    async def refuse(*_):
        raise wire.obstore.exceptions.NotSupportedError("no key to sign with")

    monkeypatch.setattr(wire.obstore, "sign_async", refuse)
    blob = open_blob("s3://bucket/a b.svs", QUICK)
    assert read(blob) is None
    assert fetch_one(blob, 70_000, 10) == [BODY]


def test_options_can_switch_it_off(server):
    blob = open_blob(f"{server.url}/a.bin", replace(QUICK, direct=False))
    assert read(blob) is None
    assert fetch_one(blob, 70_000, 10) == [BODY]


@pytest.mark.parametrize(
    "answer",
    [
        [RIGHT.replace("206 Partial Content", "200 OK").encode(), b"\r\n", BODY],
        [RIGHT.replace("206 Partial Content", "302 Found").encode() + b"Location: /b\r\n\r\n" + BODY],
        [RIGHT.replace("HTTP/1.1", "HTTP/1.0").encode() + b"\r\n" + BODY],
        [RIGHT.replace("Length: 10", "Length: 9").encode() + b"\r\n" + BODY[:9]],
        [RIGHT.replace("70000-", "70001-").encode() + b"\r\n" + BODY],
        [RIGHT.encode() + b"Transfer-Encoding: chunked\r\n\r\na\r\n" + BODY + b"\r\n0\r\n\r\n"],
        [RIGHT.encode() + b"Content-Encoding: gzip\r\n\r\n" + BODY],
        [RIGHT.encode() + b"\r\n" + BODY + b"more"],
        [b"X-Padding: " + b"x" * 8000],
        [b"\r\n\r\n"],
        [b"close"],
        [RIGHT.encode() + b"\r\n" + BODY[:5]],
    ],
)
def test_any_other_answer_is_refused(server, monkeypatch, answer):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    with answering(answer) as port:
        assert read(at(blob, port, monkeypatch)) is None


def test_an_answer_in_pieces_and_connections_that_are_not_kept(server, monkeypatch):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    head = RIGHT.lower().encode()
    with answering([head[:20], head[20:] + b"\r", b"\n" + BODY[:3], BODY[3:]]) as port:
        assert read(at(blob, port, monkeypatch), times=3) == BODY
    last = [RIGHT.encode() + b"Connection: close\r\n\r\n" + BODY]
    with answering(last, last, last) as port:
        assert read(at(blob, port, monkeypatch), times=3) == BODY


def test_bytes_that_nobody_asked_for_close_an_idle_connection(server, monkeypatch):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    right = RIGHT.encode() + b"\r\n" + BODY

    async def work():
        lines = Wire()
        for _ in range(2):
            ((body,),) = await lines.read([(blob, [70_000], [10])])
            assert bytes(body) == BODY
            (server,) = lines._servers.values()
            (connection,) = server.idle
            connection.buffer_updated(1)
            await asyncio.sleep(0.05)
            assert not server.idle
        lines.close()

    with answering([right], [right]) as port:
        at(blob, port, monkeypatch)
        asyncio.run(asyncio.wait_for(work(), 20))


def test_one_object_that_fails_does_not_fail_others(server):
    good, gone = (open_blob(f"{server.url}/{name}", QUICK) for name in ("a.bin", "dir/a%20b%25c.bin"))
    server.faults["dir/a b%c.bin"] = 404

    async def work():
        lines = Wire()
        found = await lines.read([(gone, [1], [2]), (good, [70_000, 80_000], [10, 20]), (gone, [1, 2], [2, 3])])
        lines.close()
        return [bodies and [bytes(body) for body in bodies] for bodies in found]

    found = asyncio.run(asyncio.wait_for(work(), 20))
    assert found == [None, [BODY, DATA[80_000:80_020]], None]


def test_an_object_and_a_server_that_fail_are_left_alone_for_a_while(server, monkeypatch):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    server.faults["a.bin"] = 500
    del server.requests[:]
    assert read(blob, times=3) is None
    assert len(server.requests) == 1
    monkeypatch.setattr(wire, "_REST_SECONDS", -1)
    assert read(blob, times=3) is None
    assert len(server.requests) == 4
    others = [open_blob(f"{server.url}/dir/a%20b%25c.bin", QUICK) for _ in range(6)]
    server.faults["dir/a b%c.bin"] = 500
    monkeypatch.setattr(wire, "_REST_SECONDS", 30)
    del server.requests[:]

    async def work():
        lines = Wire()
        for other in others:
            assert await lines.read([(other, [70_000], [10])]) == [None]
        lines.close()

    asyncio.run(asyncio.wait_for(work(), 20))
    assert len(server.requests) == wire._FAILURES


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_over_tls(server, tmp_path):
    """In a process of its own, since what it trusts is read once."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    program = """
        import sys
        from gigatome.blob import fetch
        from gigatome.blob.store import open_blob

        blob = open_blob(sys.argv[1])
        del fetch.obstore.get_ranges_async
        with fetch.Fetcher() as fetcher:
            wanted = [(blob, [(70_000 + 9 * k, 5)]) for k in range(40)] + [(blob, [(100_000, 200_000)])]
            sys.stdout.buffer.write(b"".join(parts[0] for parts in fetcher.fetch(wanted).result(30)))
    """
    with serve({"a.bin": DATA}, tls=context) as secure:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), f"{secure.url}/a.bin"],
            env={"SSL_CERT_FILE": str(certificate), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            timeout=60,
            cwd=Path(__file__).parent,
        )
    expected = b"".join(DATA[70_000 + 9 * k : 70_005 + 9 * k] for k in range(40)) + DATA[100_000:300_000]
    assert (done.returncode, done.stderr, done.stdout == expected) == (0, b"", True)
