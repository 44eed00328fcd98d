"""A vLLM server of its own for a benchmark or a test: started, waited for, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import shoulders
from shoulders.errors import ShouldersError

CONNECTOR = {
    "kv_connector": "PrefixConnector",
    "kv_connector_module_path": "shoulders.serving.prefix_connector",
    "kv_role": "kv_consumer",
}
PATIENCE = 900.0  # seconds until it must be there
ENDED = 30.0  # seconds that it has to stop
# On CPUs: GiB for keys/values; all cores, of which vLLM by itself leaves one to its scheduler, half
# of a small machine.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def arguments(lm: str, dtype: str, window: int, *, connector: bool) -> list[str]:
    """Return what vLLM's server is started with to serve a folder for a gateway."""
    given = ["--model", lm, "--dtype", dtype, "--max-model-len", str(window)]
    given += ["--enable-prompt-embeds"]
    return [*given, "--kv-transfer-config", json.dumps(CONNECTOR)] if connector else given


@contextmanager
def vllm_server(python: Path, given: Sequence[str], log: Path) -> Iterator[str]:
    """Start vLLM from a Python environment of its own, and yield its address when it answers.

    Args:
        python: of the environment that has vLLM.
        given: see `arguments`.
        log: file for what it says.

    Raises:
        ShouldersError: it does not start, with the last line of what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The connector is found in this package's folder, of which vLLM's environment has no copy.
    source = str(Path(shoulders.__file__).parents[1])
    # Not `vllm serve`: it asks for the version of a package `vllm`, and the CPU wheel's is another.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *given]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **SETTINGS, "PYTHONPATH": source},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers end with it
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield url
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
    raise ShouldersError(f"vLLM did not start, see {log}: {said[-1]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(ENDED)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
