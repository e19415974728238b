"""Writes a result file: the measurements, the machine, the versions, and the command."""

import json
import platform
import sys
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

FOLDER = Path(__file__).parent / "results"


def write(name, device, note, rows, **more):
    """Write results/<name>.json on rank 0. more: further fields of the file"""
    if dist.get_rank() != 0:
        return
    ranks = dist.get_world_size()
    on_gpus = device.type == "cuda"
    versions = {"torch": torch.__version__}
    if on_gpus:
        versions |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    gpu = {"gpu": torch.cuda.get_device_name(device), "gpus": ranks} if on_gpus else None
    result = {
        "machine": gpu or {"cpu": platform.machine(), "ranks": ranks},
        "versions": versions,
        "date": date.today().isoformat(),
        "command": f"torchrun --nproc-per-node {ranks} benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "note": note,
        **more,
        "rows": list(rows),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("wrote", path.relative_to(FOLDER.parent.parent), flush=True)
