"""``tw-compile plans``: the results of tuning on this machine. One machine can tune for a fleet of equal machines, and export them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import files, records
from .autotune.plan import Plan
from .autotune.schedule import Section
from .options import TokenWeaveError
from .records import Record
from .transports import agree
from .transports.low_bit import threshold
from .transports.symmetric.tuning import Tuning
from .wording import count, plan_text

_FORMAT = "tw_compile plans 1"


def listing() -> str:
    """A table of all records. Those that this version does not use are last."""
    found, others = records.on_disk()
    found.sort(key=lambda record: (_is_stale(record), records.KINDS.index(record.kind), str(record.key)))
    lines = [f"{count(len(found), 'plan')} in {files.directory()}"]
    rows = [(record.id, record.kind, _gpus(record.key), *_summary(record)) for record in found]
    widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else []
    for record, row in zip(found, rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)] + [row[4]]
        lines.append("  " + "  ".join(cells) + (f"  (not used: from {record.key['version']})" if _is_stale(record) else ""))
    if others:
        unusable = count(len(others), "unusable file")
        lines.append(f"{unusable}, damaged or of an earlier version. To remove: tw-compile plans clear --stale")
    return "\n".join(lines)


def show(ids: Iterable[str]) -> str:
    """Some records with their keys, as JSON. Raises TokenWeaveError for an unknown id."""
    return json.dumps([_plain(record) for record in _named(ids)], indent=2)


def clear(ids: Iterable[str], stale: bool) -> str:
    """Remove records, and return a message with their number.

    ids:   the records to remove; if there are none, all records
    stale: remove only records that this version does not use, and unusable files
    Raises TokenWeaveError for an unknown id, for ids beside ``stale``, and if a file cannot be removed.
    """
    if ids and stale:
        raise TokenWeaveError("plans clear takes ids or --stale, not both")
    found, others = records.on_disk()
    if ids:
        places = [record.path for record in _named(ids)]
    else:
        places = [record.path for record in found if _is_stale(record) or not stale] + others
    try:
        for place in places:
            place.unlink(missing_ok=True)
    except OSError as error:
        raise TokenWeaveError(f"{error.filename} cannot be removed: {error.strerror}") from error
    return f"{count(len(places), 'file')} removed from {files.directory()}"


def write_to(place: Path, ids: Iterable[str]) -> str:
    """Write the records with these ids, or all that this version uses, to one file. Returns a message.

    Raises TokenWeaveError for an unknown id, if there are no records, and if the file cannot be written.
    """
    chosen = _named(ids) if ids else [record for record in records.on_disk()[0] if not _is_stale(record)]
    if not chosen:
        raise TokenWeaveError(f"there is no plan to export: {files.directory()} has none from {agree.version()}")
    try:
        place.write_text(json.dumps({"format": _FORMAT, "records": [_plain(record) for record in chosen]}, indent=1))
    except OSError as error:
        raise TokenWeaveError(f"{place} cannot be written: {error.strerror}") from error
    return f"{count(len(chosen), 'plan')} written to {place}"


def read_from(place: Path) -> str:
    """Add all records of an exported file. They replace records with the same key. Returns a message.

    Raises TokenWeaveError, and adds none, if the file cannot be read, is incomplete, or has an invalid record; also if the cache cannot
    be written.
    """
    try:
        data = json.loads(place.read_bytes())
    except OSError as error:
        raise TokenWeaveError(f"{place} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TokenWeaveError(f"{place} is not JSON, or is incomplete: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT or not isinstance(data.get("records"), list):
        raise TokenWeaveError(f"{place} was not written by tw-compile plans export")
    found = [_read(each, f"{place}: record {number}") for number, each in enumerate(data["records"])]
    for record in found:
        if not records.write(record.kind, record.key, record.value):
            reason = files.unwritable(files.directory()) or "a file there cannot be replaced"
            raise TokenWeaveError(f"{files.directory()} cannot be written: {reason}. Set TW_COMPILE_CACHE_DIR to another directory")
    unused = sum(map(_is_stale, found))
    note = f"; {count(unused, 'plan')} will not be used: from another version than {agree.version()}" if unused else ""
    return f"{count(len(found), 'plan')} imported into {files.directory()}{note}"


def _read(data: dict[str, Any], what: str) -> Record:
    try:
        return _checked(Record(**data))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenWeaveError(f"{what} is not valid ({_why(error)}); nothing was imported") from error


def _named(ids: Iterable[str]) -> list[Record]:
    found = {record.id: record for record in records.on_disk()[0]}
    for each in ids:
        if each not in found:
            raise TokenWeaveError(f"there is no plan {each!r} in {files.directory()}: tw-compile plans list shows all")
    return [found[each] for each in dict.fromkeys(ids)]


def _plain(record: Record) -> dict[str, Any]:
    return {"kind": record.kind, "key": record.key, "value": record.value}


def _is_stale(record: Record) -> bool:
    return record.key.get("version") != agree.version()


def _gpus(key: dict[str, Any]) -> str:
    return f"{key.get('ranks')} × {key.get('gpu')}"


def _summary(record: Record) -> tuple[str, str]:
    """(what a record was measured for, its value), in words."""
    try:
        _checked(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return "?", f"not valid: {_why(error)}"
    key, value = record.key, record.value
    if record.kind == "plan":
        section = key["section"]
        return f"{key['transport']}, {section['hidden']} {section['dtype']}, {_sizes(section['sizes'])}", plan_text(**value)
    if record.kind == "tuning":
        return f"{key['transport']}, {key['hidden']} {key['dtype']}", f"one_shot up to {count(value['one_shot_rows'], 'token')}"
    if record.kind == "wire":
        least = value["least_bytes"]
        return f"wire of {key['wire']} bits", f"from {least >> 10} KB of partial sums on" if least else "not faster than bfloat16"
    return "time of a call", ", ".join(f"{name} {1e6 * seconds:.0f} µs" for name, seconds in value.items())


def _sizes(sizes: list[int]) -> str:
    return count(sizes[0], "token") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} tokens"


# --- checks of records: an imported file decides, for example, how many CTAs a kernel has ---------------------------------------------


def _checked(record: Record) -> Record:
    """The same record. Raises ValueError, TypeError, KeyError or AttributeError if it is not valid."""
    if record.kind not in records.KINDS:
        raise ValueError(f"kind {record.kind!r}")
    key, value = record.key, record.value
    for name, kind in {"gpu": str, "ranks": int, "version": str}.items():
        _expect(name, key[name], type(key[name]) is kind)
    {"plan": _check_plan, "tuning": _check_tuning, "transports": _check_transports, "wire": _check_wire}[record.kind](key, value)
    return record


def _why(error: Exception) -> str:
    """Why a record is not valid. error: what ``_checked`` raised"""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _check_plan(key: dict[str, Any], value: dict[str, Any]) -> None:
    Section.from_dict(key["section"])
    _expect("transport", key["transport"], isinstance(key["transport"], str))
    plan = Plan(**value)
    _expect("min_tokens", plan.min_tokens, plan.min_tokens is None or _is_number(plan.min_tokens, 1))
    _expect("ctas", plan.ctas, _is_number(plan.ctas, 0))
    _expect("split_ratio", plan.split_ratio, type(plan.split_ratio) is float and 0 < plan.split_ratio < 1)
    _expect("gain", plan.gain, _is_positive(plan.gain))
    _expect("experts_from", plan.experts_from, plan.experts_from is None or _is_number(plan.experts_from, 1))


def _check_tuning(key: dict[str, Any], value: dict[str, Any]) -> None:
    _expect("hidden", key["hidden"], _is_number(key["hidden"], 1))
    _expect("transport", key["transport"], isinstance(key["transport"], str))
    _expect("dtype", key["dtype"], isinstance(key["dtype"], str))
    tuning = Tuning.from_dict(value)
    _expect("one_shot_rows", tuning.one_shot_rows, _is_number(tuning.one_shot_rows, 0))
    firsts = [first for first, _ in tuning.ctas]
    whole = all(_is_number(n, 1) for step in tuning.ctas for n in step)
    _expect("ctas", value["ctas"], whole and firsts[:1] == [1] and firsts == sorted(set(firsts)))


def _check_transports(key: dict[str, Any], value: dict[str, Any]) -> None:
    _expect("transports", key["transports"], isinstance(key["transports"], list) and set(key["transports"]) == set(value))
    _expect("seconds", value, all(map(_is_positive, value.values())))


def _check_wire(key: dict[str, Any], value: dict[str, Any]) -> None:
    _expect("wire", key["wire"], key["wire"] in (8, 6, 4))
    _expect("least_bytes", value["least_bytes"], threshold.is_valid(value))


def _is_number(given: object, least: int) -> bool:
    return type(given) is int and given >= least


def _is_positive(given: object) -> bool:
    return isinstance(given, int | float) and type(given) is not bool and given > 0


def _expect(name: str, given: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} is {given!r}")
