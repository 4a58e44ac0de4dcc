import logging
import threading
from dataclasses import replace

import obstore
import pytest

from gigatome.blob import remote
from gigatome.blob.fetch import Fetcher
from gigatome.blob.remote import RemoteOptions, Shared, shared
from gigatome.blob.store import open_blob
from gigatome.core.errors import StoreError
from range_server import serve

DATA = bytes(range(256)) * 1000
RANGES = [(70_000, 100), (10, 5), (100_000, 5000), (70_200, 50), (200, 0), (65_530, 20), (len(DATA) - 3, 3)]
QUICK = RemoteOptions(connect_seconds=2, stall_seconds=0.2, retries=2, tries=3, cache_bytes=0)


@pytest.fixture(autouse=True)
def short_heads(monkeypatch):
    """Objects of 256 kB are then more than what their opening brings."""
    monkeypatch.setattr(remote, "HEAD_BYTES", 1 << 16)


@pytest.fixture
def server():
    files = {"a.bin": DATA, "dir/a b%c.bin": DATA, "small.bin": b"abc", "empty.bin": b""}
    with serve(files) as running:
        yield running


@pytest.fixture(params=["alone", "fetcher"])
def read(request):
    """Reads ranges of a blob, by itself or with a fetcher."""
    if request.param == "alone":
        yield lambda blob, ranges: blob.read_ranges(ranges)
        return
    with Fetcher() as fetcher:

        def fetched(blob, ranges):
            (result,) = fetcher.fetch([(blob, ranges)]).result(30)
            if isinstance(result, StoreError):
                raise result
            return result

        yield fetched


def expected(ranges):
    return [DATA[offset : offset + length] for offset, length in ranges]


def test_ranges_equal_the_file(server, read):
    blob = open_blob(f"{server.url}/a.bin")
    assert blob.size == len(DATA)
    assert read(blob, RANGES) == expected(RANGES)
    assert read(blob, []) == []
    assert read(blob, [(100_000, 0)]) == [b""]
    small = open_blob(f"{server.url}/small.bin")
    assert (small.size, read(small, [(0, 3)])) == (3, [b"abc"])
    for fault in (None, "whole"):
        server.faults["empty.bin"] = fault
        assert open_blob(f"{server.url}/empty.bin").size == 0


@pytest.mark.parametrize(("offset", "length"), [(len(DATA), 1), (len(DATA) - 5, 6), (-1, 1), (0, -1)])
def test_ranges_outside_are_errors(server, read, offset, length):
    blob = open_blob(f"{server.url}/a.bin")
    with pytest.raises(StoreError, match="outside"):
        read(blob, [(70_000, 10), (offset, length)])


def test_opening_is_one_request_and_gives_the_first_bytes(server):
    blob = open_blob(f"{server.url}/a.bin")
    assert blob.read_ranges([(0, 1000), (65_000, 536)]) == [DATA[:1000], DATA[65_000:65_536]]
    assert server.requests == [("/a.bin", "bytes=0-65535")]


def test_neighbours_are_one_request_and_gaps_are_not_fetched(server, read):
    blob = open_blob(f"{server.url}/a.bin")
    del server.requests[:]
    server.sent = 0
    wanted = [(100_000, 9000), (109_000, 9000), (160_000, 9000), (169_100, 9000), (200_000, 10), (201_000, 10)]
    assert read(blob, wanted) == expected(wanted)
    asked = sorted(header for _, header in server.requests)
    assert asked == ["bytes=100000-117999", "bytes=160000-178099", "bytes=200000-200009", "bytes=201000-201009"]
    needed = sum(length for _, length in wanted)
    assert server.sent == needed + 100 <= 1.05 * needed
    traffic = blob.traffic
    assert (traffic.requests, traffic.needed, traffic.fetched, traffic.repeated) == (4, needed, server.sent, 0)
    assert traffic.seconds > 0


def test_the_cache_spares_requests_and_can_be_switched_off(server):
    for size, requests in ((1 << 20, 1), (0, 2)):
        blob = open_blob(f"{server.url}/a.bin", RemoteOptions(cache_bytes=size))
        del server.requests[:]
        for _ in range(2):
            assert blob.read_ranges(RANGES[:1]) == expected(RANGES[:1])
        assert len(server.requests) == requests


def test_odd_names_and_signed_addresses(server, read):
    uri = f"{server.url}/dir/a%20b%25c.bin?signature=TOPSECRET&x=1"
    blob = open_blob(uri)
    assert read(blob, RANGES) == expected(RANGES)
    assert all(path.endswith("?signature=TOPSECRET&x=1") for path, _ in server.requests)
    assert "TOPSECRET" not in blob.uri


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, "not found"),
        (403, "credentials"),
        (401, "credentials"),
        (500, "answered 500 after 2 retries"),
        (429, "answered 429"),
        (400, "answered 400"),
        ("whole", "byte ranges"),
        ("short", "of 100 bytes arrived from offset 70000"),
        ("stall", "in time"),
        ("hang", "in time after 2 retries"),
        ("reset", "cannot be reached"),
    ],
)
def test_what_does_not_get_better_is_named_without_secrets(server, read, caplog, fault, message):
    uri = f"{server.url}/a.bin?signature=TOPSECRET"
    blob = open_blob(uri, QUICK)
    server.faults["a.bin"] = fault
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreError, match=message) as caught:
        read(blob, RANGES[:1])
    assert f"{server.url}/a.bin: " in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for text in (str(caught.value), caplog.text):
        assert "TOPSECRET" not in text
        assert "the secret" not in text


@pytest.mark.parametrize("fault", [404, 403, 401, 500, "whole", "short", "hang"])
def test_opening_names_what_goes_wrong(server, fault):
    server.faults["a.bin"] = fault
    with pytest.raises(StoreError, match=r"a\.bin: ") as caught:
        open_blob(f"{server.url}/a.bin?signature=TOPSECRET", QUICK)
    assert "secret" not in str(caught.value).lower()


@pytest.mark.parametrize("headers", [{}, {"ETag": '"1"'}], ids=["", "versioned"])
@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "stall", "hang", "short"])
def test_what_goes_wrong_twice_is_asked_for_again(server, read, fault, headers):
    server.headers.update(headers)
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    server.faults["a.bin"] = [fault, fault]
    assert read(blob, [(70_000, 5000), (90_000, 10)]) == [DATA[70_000:75_000], DATA[90_000:90_010]]


def test_a_server_that_is_gone():
    with serve({}) as stopped:
        url = stopped.url
    with pytest.raises(StoreError, match="cannot be reached"):
        open_blob(f"{url}/a.bin", QUICK)


def test_only_the_short_body_is_asked_for_again(server, read):
    blob = open_blob(f"{server.url}/a.bin", replace(QUICK, direct=False))
    del server.requests[:]
    server.faults["a.bin"] = ["short"]
    assert read(blob, [(70_000, 100), (90_000, 300)]) == [DATA[70_000:70_100], DATA[90_000:90_300]]
    assert len(server.requests) == 3
    traffic = blob.traffic
    assert (traffic.requests, traffic.repeated, traffic.needed) == (3, 1, 400)
    assert traffic.fetched in (450, 550)


def test_a_bit_flipped_on_a_second_read_is_found_and_read_again(server, read, caplog):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    assert read(blob, RANGES) == expected(RANGES)
    server.faults["a.bin"] = ["flip"]
    assert read(blob, RANGES) == expected(RANGES)
    assert server.flipped == 1
    assert "arrived damaged once" in caplog.text
    assert blob.traffic.repeated == 1


def test_a_bit_flipped_on_the_first_read_is_found_on_the_second(server, read, caplog):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    server.faults["a.bin"] = ["flip"]
    assert read(blob, [(80_000, 100)]) != [DATA[80_000:80_100]]
    assert read(blob, [(80_000, 100)]) == [DATA[80_000:80_100]]
    assert "differ from an earlier read" in caplog.text
    caplog.clear()
    assert read(blob, [(80_000, 100)]) == [DATA[80_000:80_100]]
    assert caplog.text == ""


def test_bytes_that_differ_each_time_are_an_error(server, read):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    assert read(blob, [(85_000, 100)]) == [DATA[85_000:85_100]]
    server.faults["a.bin"] = "flip"
    with pytest.raises(StoreError, match=r"a\.bin: bytes 85000 to 85100 arrive different each time"):
        read(blob, [(85_000, 100)])


def test_objects_of_one_host_share_a_store_and_other_settings_do_not(server, monkeypatch):
    first, second = open_blob(f"{server.url}/a.bin"), open_blob(f"{server.url}/small.bin")
    assert first.store is second.store
    assert open_blob(f"{server.url}/a.bin?signature=1").store is not first.store
    assert open_blob(f"{server.url}/a.bin", QUICK).store is not first.store
    process = Shared(RemoteOptions())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "one")
    old, key = process.store("s3://bucket/dir/a.svs")
    assert (process.store("s3://bucket/b.svs")[0], key) == (old, "dir/a.svs")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert process.store("s3://bucket/b.svs")[0] is not old


def test_stores_are_shared_by_threads_and_bounded(monkeypatch):
    monkeypatch.setattr(remote, "_STORES", 3)
    process, found = Shared(RemoteOptions()), []
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        found.append(process.store("http://127.0.0.1:1/a")[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    for host in range(5):
        process.store(f"http://127.0.0.2:{host + 1}/a")
    assert process.store("http://127.0.0.1:1/a")[0] is not found[0]


def test_addresses_and_settings_come_from_the_environment(server, monkeypatch):
    """The loopback server stands for an S3-compatible one that has no TLS."""
    server.files["bucket/a b.svs"] = DATA
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "TOPSECRET",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError) as caught:
        open_blob("s3://bucket/a%20b.svs", QUICK)
    assert "TOPSECRET" not in str(caught.value)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_TIMEOUT", "7s")
    blob = open_blob("s3://bucket/a%20b.svs", QUICK)
    assert blob.read_ranges(RANGES) == expected(RANGES)
    assert server.requests[-1][0] == "/bucket/a%20b.svs"
    assert blob.store.client_options["timeout"] == "7s"
    server.faults["bucket/a b.svs"] = 403
    with pytest.raises(StoreError, match=r"s3://bucket/a%20b\.svs: access denied") as caught:
        blob.read(70_000, 10)
    assert "TOPSECRET" not in str(caught.value)


def test_azure_takes_its_settings_from_the_environment_too(server, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("AZURE_ENDPOINT", f"{server.url}/account")
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    server.files["account/container/a.svs"] = DATA
    server.headers |= {"ETag": '"1"', "Last-Modified": "Sun, 01 Jan 2023 00:00:00 GMT"}
    assert open_blob("az://container/a.svs", QUICK).read_ranges(RANGES) == expected(RANGES)


def test_options_that_are_equal_share_a_process(server):
    assert shared(RemoteOptions(tries=3)) is shared(RemoteOptions(tries=3))
    assert isinstance(open_blob(f"{server.url}/a.bin").store, obstore.store.HTTPStore)
