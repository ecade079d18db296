"""`kvzip serve`: documents and answers over HTTP."""

import gc
import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..display import visible_line
from ..hub import Loading
from .output import say, size, stages
from .plumbing import FileName, command, finite, positive
from .sources import find_model, load_model, model_options, short

if TYPE_CHECKING:
    from ..models import Model

GB = 10**9
_gigabytes = click.FloatRange(0, min_open=True)


@command(
    "serve",
    epilog="""
    kvzip serve qwen2.5-7b contract.kvz report.kvz
    kvzip serve DIR --documents /data/documents --port 8080
    kvzip serve DIR contract.kvz --api-key SECRET --host 0.0.0.0
    """,
)
@click.argument("model", metavar="MODEL")
@click.argument("files", metavar="[DOC.kvz]...", nargs=-1, type=FileName())
@model_options(required=True, named=False)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; others than this machine's need --api-key.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--documents",
    type=FileName(),
    default=Path("kvzip-documents"),
    show_default=True,
    help="Directory of documents that clients post; it is made, and what is in it is found again.",
)
@click.option("--name", help="What requests call the model [default: its directory or the end of its id].")
@click.option("--api-key", envvar="KVZIP_API_KEY", help="That requests must carry; better in KVZIP_API_KEY.")
@click.option("--no-key", is_flag=True, help="Allow an address of the network without a key.")
@click.option(
    "--memory", type=_gigabytes, callback=finite, help="GB of documents on the device [default: what is free]."
)
@click.option(
    "--host-memory",
    type=_gigabytes,
    callback=finite,
    help="GB of documents on the host [default: half of what is free].",
)
@click.option("--tail-tokens", type=positive, help="Tokens of all questions and answers at a time.")
@click.option("--requests", type=positive, default=256, show_default=True, help="That run at a time; others wait.")
@click.option(
    "-n",
    "--max-tokens",
    type=positive,
    default=1024,
    show_default=True,
    help="Tokens of an answer where a request does not say.",
)
@click.option(
    "--largest", type=_gigabytes, callback=finite, default=0.05, show_default=True, help="GB of a request, at most."
)
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Seconds in which answers may end when the server is stopped.",
)
def serve(model: str, files: tuple[Path, ...], loading: Loading, **asked: Any) -> None:
    """Serve a model and documents over HTTP, in OpenAI's words.

    Requests name a document as MODEL:DOC, where DOC is its file's name without .kvz, or as {"document": DOC}. Without
    one they ask the model alone. Documents are posted to /v1/documents; what else there is says /docs.
    """
    _check_host(asked["host"], key=asked["api_key"], no_key=asked["no_key"])
    name = asked["name"] or short(model)
    if not name.strip() or ":" in name:
        raise click.UsageError(f"expected a --name with text and without a colon, got {visible_line(name)!r}")
    uvicorn = _uvicorn()
    with _bound(asked["host"], asked["port"]) as listening:
        with stages() as stage:
            loaded = load_model(stage, model, directory=find_model(model), loading=loading)
            stage("opening documents")
            app, service = _app(loaded, files, name, asked)
        quiet = {"log_level": "warning", "server_header": False}
        server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=asked["patience"], **quiet))
        limits, ready = service.engine.limits, sum(document.status == "ready" for document in service.library.all())
        documents = "1 document" if ready == 1 else f"{ready} documents"
        say(f"{name} and {documents}; {size(limits.memory)} for documents, {limits.tail_tokens:,} tokens of answers")
        address = f"[{asked['host']}]" if ":" in asked["host"] else asked["host"]
        gc.collect()
        gc.freeze()  # what there is now stays: looking through it again would stop all answers for a fifth of a second
        say(f"listening on http://{address}:{listening.getsockname()[1]}/v1")
        server.run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address, before the model is loaded: whoever asks meanwhile waits.

    Raises: ValueError for an address that this machine does not have, or that another program has.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(2048)
    except (OSError, TypeError, UnicodeError) as error:  # the others of names that cannot be looked up
        found.close()
        raise ValueError(
            f"expected an address of this machine with a free port, got {visible_line(host)} and {port} "
            f"({getattr(error, 'strerror', None) or error}): pass another --port or --host"
        ) from error
    return found


def _app(loaded: "Model", files: tuple[Path, ...], name: str, asked: dict[str, Any]) -> tuple[Any, Any]:
    """The app, and what it answers with."""
    from ..server.app import create_app
    from ..server.chat import Service
    from ..server.library import Library
    from ..server.metrics import Metrics
    from ..serving import Engine

    memory, host_memory = (None if x is None else int(x * GB) for x in (asked["memory"], asked["host_memory"]))
    engine = Engine(
        loaded,
        memory=memory,
        host_memory=host_memory,
        tail_tokens=asked["tail_tokens"],
        requests=asked["requests"],
    )
    try:
        library = Library(engine, asked["documents"], files)
    except BaseException:
        engine.close(cancel=True)
        raise
    service = Service(engine, library, Metrics(), name, asked["max_tokens"])
    hosts = ("localhost", "127.0.0.1", "[::1]", asked["host"]) if _is_own(asked["host"]) else None
    return create_app(service, key=asked["api_key"] or None, largest=int(asked["largest"] * GB), hosts=hosts), service


def _check_host(host: str, *, key: str | None, no_key: bool) -> None:
    if not _is_own(host) and not key and not no_key:
        raise click.UsageError(
            f"--host {visible_line(host)} lets the network ask: set KVZIP_API_KEY, or pass --no-key if that is meant"
        )


def _is_own(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401  # pyright: ignore[reportMissingImports]
        import uvicorn  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"expected FastAPI and uvicorn for a server, got no {error.name}: pip install fastapi uvicorn "
            "(in a checkout pip install -e '.[serve]')"
        ) from error
    return uvicorn
