"""`shoulders serve --skills DIR...`."""

from __future__ import annotations

import ipaddress
import logging
import signal
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoulders.cli import options
from shoulders.cli.common import note_given, quiet_libraries, stderr
from shoulders.cli.remote import connected, key_of
from shoulders.errors import ShouldersError, install
from shoulders.skills.hub import SCHEME, local

if TYPE_CHECKING:
    from shoulders.serving.skillset import SkillSet


class Kind(StrEnum):
    """What runs the LM."""

    LOCAL = "local"
    VLLM = "vllm"


def serve(
    context: typer.Context,
    skills: Annotated[
        list[str] | None,
        typer.Option(help="A skill's folder, hf://USER/SKILL, or NAME=either. Repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that requests must bring.")
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Readers: the index, or LanceDB, that they search.")
    ] = None,
    skill_root: Annotated[
        Path | None,
        typer.Option(help="Folder whose skills may be loaded and unloaded by request."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve what is, and comes to be, in --skill-root.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads. Default: one per core, 4 at most.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows that one of them decodes.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests at once; more get 429.")] = 256,
    cache_gib: Annotated[
        float,
        typer.Option(min=0.01, help="Memory for keys/values; more for moments, while it grows."),
    ] = 2.0,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Whose pages in browsers may ask, such as https://chat.example."),
    ] = None,
    playground: Annotated[
        bool | None,
        typer.Option(help="The page at /. Default: only where --host is this machine's own."),
    ] = None,
    lm: options.LMName = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
    engine: Annotated[Kind, typer.Option(help="What runs the LM; see docs/vllm.md.")] = Kind.LOCAL,
    vllm_url: Annotated[
        str | None, typer.Option(help="The vLLM server, such as http://host:8001.")
    ] = None,
    vllm_api_key_file: options.VllmKeyFile = None,
) -> None:
    """Serve one frozen LM and any number of skills over an OpenAI-compatible API."""
    if vllm_url is None:
        note_given(context, ["vllm_api_key_file"], "it goes with --vllm-url")
    key = key_of(api_key_file, "--api-key-file")
    if skill_root is not None and not skill_root.is_dir():
        raise ShouldersError(f"--skill-root {skill_root}: no such folder")
    if watch and skill_root is None:
        raise ShouldersError("--watch needs --skill-root")
    if (engine is Kind.VLLM) != (vllm_url is not None):
        raise ShouldersError("--engine vllm and --vllm-url http://HOST:PORT need each other")
    try:
        import uvicorn

        from shoulders.serving.api import Server, create_app
        from shoulders.serving.mount import add_playground
    except ImportError as error:
        raise ShouldersError(f"{error.name} is missing: {install('serve')}") from None
    from shoulders.serving.engine import Engine, EngineConfig
    from shoulders.serving.listening import bound, listen
    from shoulders.serving.metrics import Metrics
    from shoulders.serving.skillset import SkillSet
    from shoulders.serving.watch import Watcher
    from shoulders.skills.load import read_first

    sockets = bound(host, port)  # before the LM is read, which takes its time
    port = sockets[0].getsockname()[1]
    quiet_libraries()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    folders = _named(skills or [])
    first = read_first(next(iter(folders.values()))) if folders else None
    choice = options.LMChoice(lm, dtype, quantize, device_map)
    frozen = choice.load(first, remote=engine is Kind.VLLM)
    remote = None if vllm_url is None else connected(frozen, vllm_url, vllm_api_key_file)
    served = SkillSet(frozen, index=index, root=skill_root)
    for name, folder in folders.items():
        served.load(name, folder)
    answering = Engine(
        frozen,
        EngineConfig(
            workers=workers,
            max_rows=max_rows,
            max_queue=max_queue,
            cache_bytes=int(cache_gib * 2**30),
        ),
        remote,
    )
    watcher = Watcher(served) if watch else None
    if watcher is not None:
        watcher.start()
    server = Server(served, answering, Metrics(answering), key)
    app = create_app(server, allow_origin or ())
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=60
    )
    listening = uvicorn.Server(config)
    page = loopback(host) if playground is None else playground
    if page:
        add_playground(app, server, lambda: listening.should_exit)
    # uvicorn finishes what is running, then raises the signal again: that must not kill us.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        listen(sockets, config.backlog, host, port)
        _say(served, host, port, page)
        listening.run(sockets=sockets)
    finally:
        if watcher is not None:
            watcher.close()
        answering.close(60)


def _named(skills: Sequence[str]) -> dict[str, Path]:
    """Return the folders by name; raises `ShouldersError` where two have the same one."""
    folders: dict[str, Path] = {}
    for given in skills:
        name, equals, folder = given.partition("=")
        path = Path(folder)
        # A folder's path may itself hold a `=`.
        if not equals or Path(given).is_dir():
            path = Path(given)
            # A link is served under its own name.
            name = path.name if path.name not in ("", "..") else path.resolve().name
        if given.startswith(SCHEME) or folder.startswith(SCHEME):
            repository = folder if folder.startswith(SCHEME) else given
            path = Path(local(repository))
            own = repository.removeprefix(SCHEME).partition("@")[0].partition("/")[2]
            name = name if folder.startswith(SCHEME) else own
        if name in folders:
            raise ShouldersError(
                f"--skills {folders[name]} and {path} are both named '{name}': use NAME=FOLDER"
            )
        folders[name] = path
    return folders


def loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(served: SkillSet, host: str, port: int, playground: bool) -> None:
    """Tell what is served, and where."""
    names = ", ".join(served.names())
    at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    text = f"serving {names} on {at}/v1"
    text += f", a playground on {at}/" if playground else ""
    stderr().print(text, highlight=False, markup=False)
