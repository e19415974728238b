"""Results of measurements on this machine, as JSON files. Each has a value, and the key that says what it was measured for.

kind          key                                                        value
plan          section, requested, transport, link, gpu, ranks, version   ``autotune.plan.Plan``
tuning        transport, dtype, hidden, gpu, ranks, version              ``transports.symmetric.tuning.Tuning``
transports    transports, link, gpu, ranks, version                      seconds of a call over each, by name
wire          transport, wire, link, gpu, ranks, version                 bytes from which on so many bits are faster, or None

requested: see ``Options.transport_and_wire``; link: see ``transports.link``
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files

KINDS = "plan", "tuning", "transports", "wire"


@dataclass(frozen=True)
class Record:
    """One result. kind: one of KINDS; key, value: JSON objects"""

    kind: str
    key: dict[str, Any]
    value: dict[str, Any]

    @property
    def path(self) -> Path:
        return path(self.kind, self.key)

    @property
    def id(self) -> str:
        """Its name on the command line: 8 hexadecimal digits."""
        return self.path.stem.removeprefix(f"{self.kind}-")[:8]


def path(kind: str, key: dict[str, Any]) -> Path:
    return files.path(kind, json.dumps(key, sort_keys=True), "json")


def read(kind: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """The value for a key; None if there is no readable record."""
    found = _load(path(kind, key))
    return found and found.get("value")


def write(kind: str, key: dict[str, Any], value: dict[str, Any]) -> bool:
    """Write a record, with access for this user only. Returns False if it cannot be written."""
    return files.write(path(kind, key), json.dumps({"key": key, "value": value}, indent=1).encode())


def on_disk() -> tuple[list[Record], list[Path]]:
    """(all records of this machine, unusable files: damaged, or of an earlier version of this package)"""
    records, others = [], []
    for kind in KINDS:
        for place in sorted(files.directory().glob(f"{kind}-*.json")):
            data = _load(place) or {}
            if isinstance(data.get("key"), dict) and isinstance(data.get("value"), dict) and path(kind, data["key"]) == place:
                records.append(Record(kind, data["key"], data["value"]))
            else:
                others.append(place)
    return records, others


def _load(place: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
