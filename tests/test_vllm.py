"""vLLM as it is installed, on two CPU ranks: ``make test-vllm``. Elsewhere these tests skip themselves."""

import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import vllm_ranks
from ranks import Ranks
from vllm_ranks import COMPILED, ENVIRONMENT, MODELS, REQUESTS, SERVED, TOKENS, arrivals

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM, which make test-vllm installs"),
    pytest.mark.timeout(1700),
]
HERE = Path(__file__).parent
CLIENTS = 16
# The server compiles what a model in ``runs`` was compiled to.
CACHED = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Name of a model -> its checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    return {name: vllm_ranks.make(name, folder) for name in MODELS}


@pytest.fixture(scope="module")
def run(paths):
    """(name of a model, name of a run) -> what vLLM did. Two processes import vLLM once, for all engines."""
    ranks = Ranks(2, timeout=800)
    ranks(vllm_ranks.begin)

    @functools.cache
    def run(model, name):
        return ranks(vllm_ranks.run, paths[model], name)[0]

    yield run
    ranks.stop()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_eager(run, name):
    eager, compiled = run(name, "eager"), run(name, "compiled")
    # Requests waited for each other, were preempted, and found the first tokens of others in the cache, alike in both runs.
    assert eager["preempted"] == compiled["preempted"] > 0 and eager["cached"] == compiled["cached"] > 0
    assert eager["reports"] == []
    modes = [report["mode"] for report in compiled["reports"]]
    assert modes[0] == "weave" and "fuse" in modes
    for report in compiled["reports"]:
        assert len(report["sites"]) == 7 and not report["refusals"] and not report["joins"]
        assert report["alike"] == 2  # each has a name of its own
    assert [len(tokens) for tokens in compiled["tokens"]] == [TOKENS] * REQUESTS
    assert compiled["tokens"] == eager["tokens"]


@pytest.mark.parametrize("name", ["stages", "replicas"])
def test_without_tensor_parallelism_it_is_left_to_inductor(run, name):
    eager, alone = run("Llama", "eager"), run("Llama", name)
    assert alone["tokens"] == eager["tokens"]
    assert alone["reports"]
    for report in alone["reports"]:
        assert not report["sites"] and report["reasons"][0].startswith("it contains no all-reduce")


def healthy(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False


@contextlib.contextmanager
def server(path, log):
    """What ``vllm serve`` runs, with the backend; its URL.

    The command itself does not start with vLLM's package for CPUs: it asks for the version of a package of the name vllm.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [word for name, option in SERVED.items() for word in (f"--{name.replace('_', '-')}", str(option))]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "-tp", "2", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 23), "--compilation-config", json.dumps(COMPILED), *options,
    ]  # fmt: skip
    environment = {**os.environ, **CACHED, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCH_LOGS": "tokenweave"}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        while not healthy(url):
            assert process.poll() is None, "the server has ended"
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def test_server(run, paths, tmp_path):
    """16 clients at once, of which two leave while their tokens are streamed."""
    import openai

    right = run("Llama", "eager")["tokens"]
    run("Llama", "compiled")
    path, prompts = paths["Llama"], [prompt for _, prompt in arrivals()]
    log = tmp_path / "log"

    def ask(number):
        leaves, got = number in (3, 11), []
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", timeout=120, max_retries=0)
        most = SERVED["max_model_len"] - len(prompts[number]) if leaves else TOKENS
        extra = {"ignore_eos": True, "return_token_ids": True}
        how = dict(model=path, temperature=0, max_tokens=most, stream=True, extra_body=extra)
        with client.completions.create(prompt=prompts[number], **how) as stream:
            for chunk in stream:
                got += chunk.choices[0].token_ids or []
                if leaves and len(got) > 1:
                    return got
        return got

    def counts():
        """Requests that run, and requests that have all their tokens. vLLM does not count those that it has aborted."""
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as metrics:
            lines = metrics.read().decode().splitlines()
        names = "vllm:num_requests_running", "vllm:request_success_total"
        return [sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in names]

    with open(log, "w") as output, server(path, output) as url:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
            got = [*clients.map(ask, range(CLIENTS))]
        assert ask(0) == got[0]
        for _ in range(100):
            if counts() == [0, CLIENTS - 2 + 1]:
                break
            time.sleep(0.1)
        assert counts() == [0, CLIENTS - 2 + 1]
    assert all(tokens[:TOKENS] == right[number][: len(tokens)] for number, tokens in enumerate(got))
    assert [len(tokens) for number, tokens in enumerate(got) if number not in (3, 11)] == [TOKENS] * (CLIENTS - 2)
    assert "7 sites, 0 refused, 0 unsplit ops" in log.read_text()
