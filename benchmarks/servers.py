"""Real servers on 127.0.0.1 to read slides from: nginx (http, with a delay), nanio (S3) and azurite (Azure).

Each has a free port and its own temporary folder, and is ended by process id. nginx comes from the system (Debian:
``apt-get install nginx-light libnginx-mod-http-lua``); nanio and azurite are installed on first use, by pip and npm,
under ``$XDG_CACHE_HOME/gigatome-bench``.
"""

import base64
import contextlib
import datetime
import hashlib
import hmac
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import obstore

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gigatome-bench"
NANIO, AZURITE = "nanio==0.1.7", "azurite@3.37"
# Azurite's published account, the same in every installation.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_BUCKET = "slides"


class MissingServerError(Exception):
    """A server is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        name: "nginx", "nanio" or "azurite".
        uris: address of each slide, by its name there.
        environment: variables that a client needs.
        process: id of its first process.
        delay: seconds added to each request.
    """

    name: str
    uris: Mapping[str, str]
    environment: Mapping[str, str]
    process: int
    delay: float = 0.0

    def cpu_seconds(self) -> float:
        """Processor time that it and its children have used."""
        children = Path(f"/proc/{self.process}/task/{self.process}/children").read_text().split()
        return sum(_cpu_seconds(int(process)) for process in [self.process, *children])


@contextlib.contextmanager
def nginx(slides: Mapping[str, Path], delay: float = 0.05) -> Iterator[Server]:
    """Serves files, by the name they have there, over http with ranges, each request ``delay`` seconds late.

    Raises:
        MissingServerError: nginx, or its Lua module, is not installed.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    hint = "on Debian and Ubuntu: apt-get install nginx-light libnginx-mod-http-lua"
    if program is None:
        raise MissingServerError(f"nginx is not installed; {hint}")
    built = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stderr
    folder = re.search(r"--modules-path=(\S+)", built)
    modules = [Path(folder[1]) / f"{name}.so" for name in ("ndk_http_module", "ngx_http_lua_module")] if folder else []
    if delay and not (modules and all(module.is_file() for module in modules)):
        raise MissingServerError(f"nginx has no Lua module to delay requests; {hint}")
    with tempfile.TemporaryDirectory(prefix="gigatome-nginx-") as scratch:
        port, root = _free_port(), Path(scratch) / "slides"
        _place(slides, root)
        # The files are the user's own; started as root, nginx would otherwise read them as nobody.
        user = "user root;" if os.geteuid() == 0 else ""
        load = "".join(f"load_module {module};\n" for module in modules) if delay else ""
        late = f"access_by_lua_block {{ ngx.sleep({delay}) }}" if delay else ""
        configuration = Path(scratch) / "nginx.conf"
        configuration.write_text(
            load
            + textwrap.dedent(f"""
            {user}
            worker_processes 1; daemon off; pid {scratch}/nginx.pid; error_log stderr error;
            events {{ worker_connections 8192; }}
            http {{
                access_log off; sendfile on; tcp_nopush on; keepalive_requests 10000000; keepalive_timeout 300;
                client_body_temp_path {scratch}/body; proxy_temp_path {scratch}/proxy;
                fastcgi_temp_path {scratch}/fastcgi; uwsgi_temp_path {scratch}/uwsgi; scgi_temp_path {scratch}/scgi;
                open_file_cache max=1000 inactive=300s;
                server {{ listen 127.0.0.1:{port} backlog=4096; root {root}; {late} }}
            }}
        """)
        )
        command = [program, "-p", scratch, "-c", str(configuration), "-e", "stderr"]
        with _running(command, {}, port, scratch) as process:
            uris = {name: f"http://127.0.0.1:{port}/{name}" for name in slides}
            yield Server("nginx", uris, {}, process, delay)


@contextlib.contextmanager
def nanio(slides: Mapping[str, Path]) -> Iterator[Server]:
    """Serves files over the S3 protocol, with signatures checked.

    Raises:
        MissingServerError: it cannot be installed.
    """
    folder = CACHE / "nanio"
    program = folder / "bin" / "nanio"
    if not program.is_file():
        _install([sys.executable, "-m", "venv", str(folder)], [str(folder / "bin" / "pip"), "install", "-q", NANIO])
    with tempfile.TemporaryDirectory(prefix="gigatome-nanio-") as scratch:
        port, name, secret = _free_port(), "benchmark", "benchmark-secret"
        _place(slides, Path(scratch) / "data" / _BUCKET)
        command = [str(program), "serve", "--data-dir", f"{scratch}/data", "--host", "127.0.0.1", "--port", str(port)]
        keys = {"NANIO_ACCESS_KEY": name, "NANIO_SECRET_KEY": secret}
        with _running([*command, "--no-access-log"], keys, port, scratch) as process:
            environment = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": name,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_REGION": "us-east-1",
            }
            uris = {name: f"s3://{_BUCKET}/{name}" for name in slides}
            yield Server("nanio", uris, environment, process)


@contextlib.contextmanager
def azurite(slides: Mapping[str, Path]) -> Iterator[Server]:
    """Serves files over the protocol of Azure Blob Storage; they are uploaded first.

    Raises:
        MissingServerError: it cannot be installed, or there is no Node.js.
    """
    folder, node = CACHE / "azurite", shutil.which("node")
    program = folder / "node_modules" / ".bin" / "azurite-blob"
    if node is None or shutil.which("npm") is None:
        raise MissingServerError("Node.js and npm are not installed; on Debian and Ubuntu: apt-get install nodejs npm")
    if not program.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _install(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), AZURITE])
    with tempfile.TemporaryDirectory(prefix="gigatome-azurite-") as scratch:
        port = _free_port()
        command = [
            node, str(program), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", scratch,
            "--silent", "--skipApiVersionCheck", "--disableTelemetry",
        ]  # fmt: skip
        with _running(command, {}, port, scratch) as process:
            endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
            _make_container(port)
            store = obstore.store.AzureStore(
                _BUCKET,
                account_name=_ACCOUNT,
                account_key=_KEY,
                endpoint=endpoint,
                client_options={"allow_http": True},
            )
            for name, path in slides.items():
                obstore.put(store, name, path)
            environment = {
                "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
                "AZURE_ENDPOINT": endpoint,
                "AZURE_ALLOW_HTTP": "true",
            }
            yield Server("azurite", {name: f"az://{_BUCKET}/{name}" for name in slides}, environment, process)


SERVERS: Mapping[str, Callable[[Mapping[str, Path]], contextlib.AbstractContextManager[Server]]] = {
    "nginx": nginx,
    "nanio": nanio,
    "azurite": azurite,
}
"""How each server is started, by name."""


def _make_container(port: int) -> None:
    """Creates the container; obstore reads and writes blobs only."""
    date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = f"x-ms-date:{date}\nx-ms-version:2023-11-03\n"
    resource = f"/{_ACCOUNT}/{_ACCOUNT}/{_BUCKET}\nrestype:container"
    text = "PUT" + "\n" * 12 + headers + resource
    signature = base64.b64encode(hmac.digest(base64.b64decode(_KEY), text.encode(), hashlib.sha256)).decode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    sent = {
        "x-ms-date": date,
        "x-ms-version": "2023-11-03",
        "Authorization": f"SharedKey {_ACCOUNT}:{signature}",
        "Content-Length": "0",
    }
    connection.request("PUT", f"/{_ACCOUNT}/{_BUCKET}?restype=container", headers=sent)
    status = connection.getresponse().status
    connection.close()
    if status != 201:
        raise MissingServerError(f"azurite does not create a container (status {status})")


def _place(slides: Mapping[str, Path], folder: Path) -> None:
    """Puts the slides into a folder: hard links, since nanio does not follow others, or copies."""
    folder.mkdir(parents=True)
    for name, path in slides.items():
        try:
            os.link(path.resolve(), folder / name)
        except OSError:
            shutil.copyfile(path, folder / name)


@contextlib.contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str], port: int, scratch: str) -> Iterator[int]:
    """Process id of a server that answers on its port; ended when the block is left."""
    with (Path(scratch) / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=scratch, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                said = (Path(scratch) / "log").read_text(errors="replace")[-2000:]
                raise MissingServerError(f"{command[0]} does not start: {said}")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _install(*commands: Sequence[str]) -> None:
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise MissingServerError(f"{' '.join(command)} fails: {(done.stderr or done.stdout)[-1000:]}")


def _cpu_seconds(process: int) -> float:
    with contextlib.suppress(FileNotFoundError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
