"""`shoulders serve --skills DIR...`."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoulders.cli.common import precision, quiet_libraries, stderr
from shoulders.errors import ShouldersError

if TYPE_CHECKING:
    from shoulders.serving.skillset import SkillSet


def serve(
    skills: Annotated[
        list[str] | None,
        typer.Option(help="A skill's folder, or NAME=FOLDER. Repeatable."),
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
    cache_gib: Annotated[float, typer.Option(min=0.01, help="Memory for keys/values.")] = 2.0,
    lm: Annotated[str | None, typer.Option(help="LM: embedded, Hub id, folder, .gguf.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or int8.")] = None,
) -> None:
    """Serve one frozen LM and any number of skills over an OpenAI-compatible API."""
    key = _key(api_key_file)
    if skill_root is not None and not skill_root.is_dir():
        raise ShouldersError(f"--skill-root {skill_root}: no such folder")
    if watch and skill_root is None:
        raise ShouldersError("--watch needs --skill-root")
    try:
        import uvicorn

        from shoulders.serving.api import Server, create_app
    except ImportError as error:
        raise ShouldersError(f"{error.name} is missing: pip install 'shoulders[serve]'") from None
    from shoulders.lm.load import load_lm
    from shoulders.serving.engine import Engine, EngineConfig
    from shoulders.serving.metrics import Metrics
    from shoulders.serving.skillset import SkillSet
    from shoulders.serving.watch import Watcher
    from shoulders.skills.artefact import read_artefact

    quiet_libraries()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    folders = dict(_named(one) for one in skills or [])
    first = read_artefact(next(iter(folders.values()))) if folders else None
    frozen = load_lm(
        lm or (first.lm.name if first else "embedded"),
        dtype=precision(dtype or (first.lm_dtype if first else "auto")),
        quantize=first.lm_quantize if first else None,
    )
    served = SkillSet(frozen, index=index, root=skill_root)
    for name, folder in folders.items():
        served.load(name, folder)
    engine = Engine(
        frozen,
        EngineConfig(
            workers=workers,
            max_rows=max_rows,
            max_queue=max_queue,
            cache_bytes=int(cache_gib * 2**30),
        ),
    )
    watcher = Watcher(served) if watch else None
    if watcher is not None:
        watcher.start()
    app = create_app(Server(served, engine, Metrics(engine), key))
    _say(served, host, port)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=60
    )
    # uvicorn finishes what is running, then raises the signal again: that must not kill us.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        uvicorn.Server(config).run()
    finally:
        if watcher is not None:
            watcher.close()
        engine.close(60)


def _key(file: Path | None) -> str | None:
    if file is None:
        return None
    if not file.is_file() or not (key := file.read_text(encoding="utf-8").strip()):
        raise ShouldersError(f"--api-key-file {file}: holds no key")
    return key


def _named(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    path = Path(folder if equals else given)
    return (name if equals else path.resolve().name), path


def _say(served: SkillSet, host: str, port: int) -> None:
    """Tell what is served, and where."""
    names = ", ".join(served.names())
    stderr().print(f"serving {names} on http://{host}:{port}/v1", highlight=False, markup=False)
