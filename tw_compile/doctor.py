"""``tw-compile doctor``: checks what the backend needs on this machine, and says what to do about what is missing.

One process checks the machine for a group of all its GPUs. Under torchrun the ranks also test and measure the transports peer and
process_group, in the environment as it is. The doctor does not run multimem: it only asks whether the GPUs have multicast.
"""

import contextlib
import functools
import getpass
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from . import compat, environment, files, records
from .options import KILL_SWITCH, TokenWeaveError, parse
from .site import SLOT_WHOLE, Planned, Site
from .transports import agree, choose
from .transports.symmetric import host, nvrtc, support, tuning
from .wording import count

OK, NOTE, MISSING = "ok", "note", "MISSING"

# Hidden size and numbers of tokens of the measurements: few tokens measure latency, many measure bandwidth.
_HIDDEN = 4096
_TOKENS = {"cuda": (1, 8192), "cpu": (1, 512)}
_SAMPLES = 5
_TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True)
class Finding:
    """A line of the output. name: what was checked; text: the result; status: OK, NOTE or MISSING; advice: what to do, if not OK"""

    name: str
    text: str
    status: str = OK
    advice: str = ""


def main() -> int:
    """Print the findings, on rank 0 only. Returns the exit status: 1 if something that is needed is missing."""
    findings = examine()
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        findings += list(_probed("ranks", _ranks))
    else:
        findings.append(Finding("ranks", "not measured: torchrun --nproc-per-node 2 -m tw_compile doctor", NOTE))
    failed = [finding.name for finding in findings if finding.status == MISSING]
    if int(os.environ.get("RANK", "0")) == 0:
        print(table(findings))
        print(f"missing: {', '.join(failed)}" if failed else "nothing that is needed is missing")
    return 1 if failed else 0


def table(findings: list[Finding]) -> str:
    """The findings as lines, each with further lines and its advice below."""
    names, lines = max(len(finding.name) for finding in findings), []
    for finding in findings:
        first, *rest = finding.text.splitlines() or [""]
        lines.append(f"{finding.status:<7}  {finding.name:<{names}}  {first}")
        rest += [f"-> {finding.advice}"] if finding.advice else []
        lines += [f"{'':<7}  {'':<{names}}  {line}" for line in rest]
    return "\n".join(lines)


def examine() -> list[Finding]:
    """The findings of one process. A probe that fails has a line of its own, and does not stop the others."""
    return [finding for name, probe in _PROBES.items() for finding in _probed(name, probe)]


def _probed(name: str, probe: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from probe()
    except Exception as error:  # a broken machine is what the doctor is for
        yield Finding(name, f"the check failed: {type(error).__name__}: {error}", NOTE)


# --- software ------------------------------------------------------------------------------------------------------------------------


def _package() -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("tw_compile")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    text = f"{version}, Python {platform.python_version()}, {platform.system()}"
    if "tokenweave" in torch.compiler.list_backends(exclude_tags=()):
        yield Finding("tw_compile", text)
    else:
        text += '; torch.compile does not know the backend "tokenweave"'
        yield Finding("tw_compile", text, MISSING, "pip install . in a checkout of tw_compile")


def _pytorch() -> Iterator[Finding]:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    text = f"{torch.__version__}{cuda}; tested with {' to '.join(compat.TESTED)}"
    lacking = compat.missing() + (compat.missing_on_gpus() if torch.cuda.is_available() else [])
    if lacking and files.unwritable(_inductors_cache()):
        yield Finding("PyTorch", f"{text}; parts of it cannot be imported, as Inductor's cache cannot be written", NOTE)
    elif lacking:
        yield Finding("PyTorch", f"{text}; it lacks {', '.join(lacking)}", MISSING, f"pip install 'torch=={compat.TESTED[1]}.*'")
    else:
        yield Finding("PyTorch", text, OK if compat.is_tested() else NOTE)


def _cpp_compiler() -> Iterator[Finding]:
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler:
        yield Finding("C++ compiler", f"{compiler}, {_first_line(compiler, '--version')}")
    else:
        yield Finding("C++ compiler", "none; Inductor needs one", MISSING, "install g++, or set CXX")


def _c_compiler() -> Iterator[Finding]:
    compiler = host.find_compiler()
    if not torch.cuda.is_available():
        yield Finding("C compiler", f"{compiler or 'none'}; needed on GPUs only", OK if compiler else NOTE)
    elif reason := host.missing():
        yield Finding("C compiler", reason, MISSING, "install gcc and Python's headers (python3-dev), or set CC")
    else:
        yield Finding("C compiler", f"{compiler}; csrc/host.c is compiled and loaded")


def _nvrtc() -> Iterator[Finding]:
    reason, on_gpus = nvrtc.missing(), torch.cuda.is_available()
    if reason and on_gpus:
        yield Finding("NVRTC", reason, MISSING, f"pip install 'cuda-bindings>=13.0' nvidia-cuda-nvrtc (CUDA {torch.version.cuda})")
    else:
        yield Finding("NVRTC", reason or f"{nvrtc.version()}", NOTE if reason else OK)


# --- GPUs ----------------------------------------------------------------------------------------------------------------------------


def _driver() -> Iterator[Finding]:
    versions = _smi("--query-gpu=driver_version", "--format=csv,noheader")
    if versions is None:
        yield Finding("driver", "no NVIDIA driver: nvidia-smi is missing, or fails", NOTE)
    elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("driver", f"NVIDIA {versions.splitlines()[0]}; CUDA_VISIBLE_DEVICES is empty, which hides the GPUs", NOTE)
    elif not torch.cuda.is_available():
        build = f"is for CUDA {torch.version.cuda}" if torch.version.cuda else "is for CPUs"
        text = f"NVIDIA {versions.splitlines()[0]}, but PyTorch sees no GPU: {torch.__version__} {build}"
        yield Finding("driver", text, MISSING, "install the PyTorch for this driver: https://pytorch.org/get-started/locally")
    else:
        yield Finding("driver", f"NVIDIA {versions.splitlines()[0]}")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPUs", "none", NOTE)
        return
    kinds: Counter[str] = Counter()
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        kinds[f"{found.name} ({found.major}.{found.minor}, {found.total_memory / 1e9:.0f} GB)"] += 1
    yield Finding("GPUs", ", ".join(f"{count} × {kind}" for kind, count in kinds.items()))


def _links() -> Iterator[Finding]:
    world = torch.cuda.device_count()
    if world < 2:
        return
    links = links_of(_smi("topo", "-m") or "")
    if links:
        yield Finding(
            "links",
            "pairs of GPUs: " + ", ".join(f"{count} by {_LINKS.get(kind[:2], 'PCIe')} ({kind})" for kind, count in links.items()),
        )
    else:
        yield Finding("links", "unknown: nvidia-smi topo -m shows none", NOTE)
    apart = [reason for index in range(world) if (reason := support.unreachable(index, range(world)))]
    yield Finding("peer access", "; ".join(apart) or "each GPU can reach the memory of all others", NOTE if apart else OK)
    without = [index for index in range(world) if not support.has_multicast(index)]
    text = "on all GPUs" if not without else f"not on GPUs {', '.join(map(str, without))}, or it is switched off"
    yield Finding("multicast", f"{text}; the doctor does not run multimem", NOTE if without else OK)


_LINKS = {"NV": "NVLink"}


def links_of(topology: str) -> dict[str, int]:
    """The links between GPUs, from the output of ``nvidia-smi topo -m``: kind ("NV18"; for PCIe, such as "SYS") -> number of pairs."""
    rows = [row.split() for row in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    pairs = [kind for number, row in enumerate(rows) for kind in row[1:][number + 1 : len(rows)]]
    return dict(Counter(pairs))


# --- environment, caches, transport --------------------------------------------------------------------------------------------------


def _environment() -> Iterator[Finding]:
    try:
        mode, _ = parse(None)
        effect = {"off": "off: every graph is left to Inductor", "fuse": "fuse: no graph is woven", "weave": "not set"}[mode.most]
        yield Finding("environment", f"{KILL_SWITCH} is {effect}", OK if mode.most == "weave" else NOTE)
    except TokenWeaveError as error:
        yield Finding("environment", f"{error}. Each compilation fails", MISSING, f"unset {KILL_SWITCH} on all ranks")
    yield from (Finding("environment", effect, NOTE) for effect in environment.effects())


def _caches() -> Iterator[Finding]:
    place = files.directory()
    found, others = records.on_disk()
    kernels = len([*place.glob("*.cubin")])
    text = f"{place}: {_size(place)}, {count(len(found), 'plan')}, {count(kernels, 'kernel')}"
    text += f", {count(len(others), 'unusable file')}" if others else ""
    advice = "set TW_COMPILE_CACHE_DIR to a directory of this user's"
    if reason := files.unwritable(place):
        yield Finding("cache", f"{place} cannot be written: {reason}; each start autotunes and compiles kernels anew", NOTE, advice)
    elif reason := files.unsafe(place / "any"):
        yield Finding("cache", f"{text}\n{reason}; compiled programs are not loaded from there", NOTE, advice)
    else:
        yield Finding("cache", text)
    inductor = _inductors_cache()
    if reason := files.unwritable(inductor):
        text, advice = f"{inductor} cannot be written: {reason}; Inductor needs it", "set TORCHINDUCTOR_CACHE_DIR to another directory"
        yield Finding("Inductor's cache", text, MISSING, advice)
    else:
        yield Finding("Inductor's cache", f"{inductor}: {_size(inductor)}")


def _inductors_cache() -> Path:
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")


def _transport() -> Iterator[Finding]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 1:
        yield Finding("transport", "none for one GPU: a tensor-parallel group has two or more", NOTE)
        return
    of = f"for a group of {gpus} GPUs" if gpus else "for a group on the CPU"
    reasons = {name: _why_not(name, gpus) for name in ("multimem", "peer")}
    usable = [name for name, reason in reasons.items() if reason is None]
    text = " or ".join(usable) + (", whichever is faster," if len(usable) > 1 else "") if usable else "process_group"
    lines = [f"{text} {of}", *(f"not {name}: {reason}" for name, reason in reasons.items() if reason)]
    yield Finding("transport", "\n".join(lines), OK if usable or not gpus else NOTE)


def _why_not(name: str, gpus: int) -> str | None:
    """Why a group of all GPUs of this machine cannot use a transport; None if it can."""
    if not gpus:
        return "it needs NVIDIA GPUs"

    def unreachable(index: int) -> str | None:
        return support.unreachable(index, range(gpus))

    def reason_on(index: int) -> str | None:
        device = torch.device("cuda", index)
        return choose.lacking(device) or support.unavailable_to(gpus, device, name == "multimem", unreachable)

    return next((reason for index in range(gpus) if (reason := reason_on(index))), None)


_PROBES = {
    "tw_compile": _package,
    "PyTorch": _pytorch,
    "C++ compiler": _cpp_compiler,
    "C compiler": _c_compiler,
    "NVRTC": _nvrtc,
    "driver": _driver,
    "GPUs": _gpus,
    "links": _links,
    "environment": _environment,
    "cache": _caches,
    "transport": _transport,
}


# --- under torchrun ------------------------------------------------------------------------------------------------------------------


def _ranks() -> Iterator[Finding]:
    """Test and measure the transports of a group of all ranks. A collective."""
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= here
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=_TIMEOUT, device_id=device if on_gpus else None)
    try:
        yield Finding("ranks", f"{dist.get_world_size()}, {dist.get_backend()}, on {'GPUs' if on_gpus else 'the CPU'}")
        for name in ("peer", "process_group"):
            yield from _probed(name, functools.partial(_measured, name, device))
    finally:
        dist.destroy_process_group()


def _measured(name: str, device: torch.device) -> Iterator[Finding]:
    group = dist.group.WORLD.group_name
    said = agree.exchange(group, f"the doctor's check of {name}", choose.unavailable(name, group, device) or "")
    if reason := next((f"{reason} (rank {rank})" for rank, reason in enumerate(said) if reason), None):
        yield Finding(name, reason, NOTE)
        return
    transport, wrong = choose.self_tested(name, group, device)
    if transport is None or wrong:
        yield Finding(name, f"{wrong}", MISSING, "report it with this output; do not use this transport")
        return
    seconds = {tokens: _seconds(transport, device, tokens) for tokens in _TOKENS[device.type]}
    of_ranks = agree.exchange(group, f"the times of {name}", json.dumps([*seconds.values()]))
    slowest = [max(times) for times in zip(*map(json.loads, of_ranks))]
    world, (few, many) = dist.get_world_size(), seconds
    moved = 2 * (world - 1) / world * many * _HIDDEN * tuning.COMPARED_DTYPE.itemsize
    text = (
        f"self-test passed; {slowest[0] * 1e6:.0f} µs for {count(few, 'token')}, {moved / slowest[1] / 1e9:.3g} GB/s on the wire for {many}"
    )
    yield Finding(name, f"{text} tokens of {_HIDDEN} {str(tuning.COMPARED_DTYPE).removeprefix('torch.')}, all-reduce + add + norm")


def _seconds(transport: choose.Transport, device: torch.device, tokens: int) -> float:
    """Seconds of one call on this rank, the median of _SAMPLES samples."""
    weight = torch.ones(_HIDDEN, dtype=tuning.COMPARED_DTYPE, device=device)
    transport.prepare([Planned(SLOT_WHOLE, weight.dtype, (tokens, _HIDDEN), False)])
    seconds = _seconds_on_gpu if device.type == "cuda" else _seconds_on_cpu
    return statistics.median([seconds(transport, weight, tokens) for _ in range(_SAMPLES + 1)][1:])


def _seconds_on_gpu(transport: choose.Transport, weight: torch.Tensor, tokens: int) -> float:
    return tuning.seconds_of_call(transport, weight, tokens, 0, tuning.COMPARED_HEAD_START)


def _seconds_on_cpu(transport: choose.Transport, weight: torch.Tensor, tokens: int) -> float:
    x = weight.expand(tokens, -1)
    dist.barrier()
    begin = time.perf_counter()
    transport.fused(Site(x, x, weight), False)
    return time.perf_counter() - begin


# --- helpers -------------------------------------------------------------------------------------------------------------------------


def _smi(*arguments: str) -> str | None:
    """The output of nvidia-smi; None if it is missing, or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    run = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, errors="replace", timeout=60, check=False)
    return run.stdout if run.returncode == 0 and run.stdout.strip() else None


def _first_line(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    return (run.stdout.splitlines() or [""])[0]


def _size(directory: Path) -> str:
    """The size of all files in a directory."""
    number = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # another process has removed it
                number += os.lstat(os.path.join(folder, name)).st_size
    return f"{number / 1e6:.1f} MB"
