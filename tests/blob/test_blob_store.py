import os
import threading
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest

from gigatome.blob import store
from gigatome.blob.store import atomic_path, is_remote, list_uris, local_path, open_blob, redact, write_atomic
from gigatome.core.errors import StoreError
from range_server import serve

DATA = bytes(range(256)) * 1000
RANGES = [(70_000, 100), (10, 5), (100_000, 5000), (70_200, 50), (200, 0), (65_530, 20), (len(DATA) - 3, 3)]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    return tmp_path / "a.bin"


@pytest.fixture
def server():
    with serve({"a.bin": DATA}) as running:
        yield running


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def expected(ranges):
    return [DATA[offset : offset + length] for offset, length in ranges]


def test_local_ranges(path):
    for uri in (path, str(path), f"file://{path}"):
        blob = open_blob(uri)
        assert blob.size == len(DATA)
        assert blob.read_ranges(RANGES) == expected(RANGES)
        blob.close()
        blob.close()


def test_the_descriptor_of_a_local_file_and_of_none(path, server):
    blob = open_blob(path)
    assert os.pread(blob.handle, 5, 1000) == DATA[1000:1005]
    blob.close()
    assert blob.handle == -1
    assert open_blob(f"{server.url}/a.bin").handle == -1


def test_local_reads_from_many_threads_do_not_mix(path):
    blob = open_blob(path)
    offsets = [(k * 7919) % 250_000 for k in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda offset: blob.read(offset, 1000), offsets))
    assert parts == [DATA[offset : offset + 1000] for offset in offsets]


@pytest.mark.parametrize(("offset", "length"), [(len(DATA), 1), (len(DATA) - 5, 6), (-1, 1), (0, -1)])
def test_a_range_outside_is_an_error_and_never_short(path, server, offset, length):
    for uri in (path, f"{server.url}/a.bin"):
        with pytest.raises(StoreError, match="outside"):
            open_blob(uri).read(offset, length)


def test_a_file_that_shrinks_while_open_is_an_error(path):
    blob = open_blob(path)
    os.truncate(path, 1000)
    with pytest.raises(StoreError, match="of 500 bytes arrived"):
        blob.read(900, 500)


def test_what_is_not_there_or_no_file(tmp_path, path):
    with pytest.raises(StoreError, match="no such file"):
        open_blob(tmp_path / "b.bin")
    with pytest.raises(StoreError, match="folder"):
        open_blob(tmp_path)
    with pytest.raises(StoreError, match="ftp:// is not supported"):
        open_blob("ftp://host/a.bin")


def test_redact():
    assert redact("abfss://box@account.dfs.core.windows.net/a.svs") == "abfss://box@account.dfs.core.windows.net/a.svs"
    assert redact("https://user:pw@host:80/a/b.svs?sig=1#x") == "https://host:80/a/b.svs"
    assert redact("s3://key:secret@bucket/a.svs") == "s3://bucket/a.svs"
    assert redact("/data/a?b.svs") == "/data/a?b.svs"


def test_is_remote_and_local_path():
    assert all(is_remote(f"{scheme}://x/y") for scheme in ("s3", "gs", "az", "http", "https", "HTTPS"))
    assert not any(is_remote(uri) for uri in ("a/b.svs", "file:///a", "/a://b", "ftp://x"))
    assert str(local_path("file:///a%20b/c")) == "/a b/c"


def test_list_uris(tmp_path):
    for name in ("b.svs", "sub/a.SVS", "sub/deep/c.tif", "notes.txt", ".hidden.svs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.svs").mkdir()

    def listed(prefix, suffixes=(".svs", ".tif")):
        return [str(os.path.relpath(uri, tmp_path)) for uri in list_uris(prefix, suffixes)]

    assert listed(tmp_path) == ["b.svs", "sub/a.SVS", "sub/deep/c.tif"]
    assert listed(f"{tmp_path}/*.svs") == ["b.svs"]
    assert listed(f"{tmp_path}/**/*.tif") == ["sub/deep/c.tif"]
    assert listed(tmp_path / "b.svs") == ["b.svs"]
    assert listed(f"{tmp_path}/nothing*") == []
    with pytest.raises(StoreError, match="no such folder"):
        list_uris(tmp_path / "missing", (".svs",))
    with pytest.raises(StoreError, match="CSV"):
        list_uris("https://host/slides/", (".svs",))


def test_list_uris_of_a_bucket(monkeypatch):
    bucket = obstore.store.MemoryStore()
    for name in ("x/b.svs", "x/y/a.SVS", "x/notes.txt", "z/c.svs"):
        obstore.put(bucket, name, b"1")
    monkeypatch.setattr(obstore.store, "from_url", lambda *_, **__: bucket)
    assert list_uris("s3://bucket/x", (".svs",)) == ["s3://bucket/x/b.svs", "s3://bucket/x/y/a.SVS"]


def test_atomic_path_appears_whole(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "one"
    assert names(target.parent) == ["a.txt"]


def test_atomic_path_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    write_atomic(target, "old")

    def half():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert (target.read_text(), names(tmp_path)) == ("old", ["a.txt"])

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", refuse)
    with pytest.raises(StoreError, match="No space left"):
        write_atomic(target, b"new")
    assert (target.read_text(), names(tmp_path)) == ("old", ["a.txt"])


def test_atomic_path_without_a_file_or_a_folder(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"), atomic_path(tmp_path / "a.txt"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made"):
        write_atomic(tmp_path / "file" / "a.txt", "x")


def test_two_threads_write_one_file(tmp_path):
    target, texts = tmp_path / "a.txt", ["a" * 100_000, "b" * 100_000]
    barrier = threading.Barrier(2)

    def write(text):
        for _ in range(10):
            barrier.wait()
            write_atomic(target, text)
            assert target.read_text() in texts

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, texts))
    assert names(tmp_path) == ["a.txt"]
