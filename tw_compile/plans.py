"""``tw-compile plans``: what was tuned on this machine. One machine can tune for a fleet of its kind, and ship the file."""

import json
from collections.abc import Iterable
from pathlib import Path

from . import files, records
from .autotune.plan import Plan
from .autotune.schedule import Section
from .options import TokenWeaveError
from .records import Record
from .report import plan_text
from .transports import agree
from .transports.symmetric.tuning import Tuning

_FORMAT = "tw_compile plans 1"


def listing() -> str:
    """A table of all records, those that this version does not use last."""
    found, others = records.on_disk()
    found.sort(key=lambda record: (_is_stale(record), records.KINDS.index(record.kind), str(record.key)))
    lines = [f"{len(found)} plans in {files.directory()}"]
    rows = [(record.id, record.kind, _gpus(record.key), *_summary(record)) for record in found]
    widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else []
    for record, row in zip(found, rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)] + [row[4]]
        lines.append("  " + "  ".join(cells) + (f"  (not used: of {record.key['version']})" if _is_stale(record) else ""))
    if others:
        lines.append(f"{len(others)} files of an earlier version of tw_compile, or damaged: tw-compile plans clear --stale removes them")
    return "\n".join(lines)


def show(ids: Iterable[str]) -> str:
    """All that is known of some records, as JSON. Raises TokenWeaveError for an id that there is not."""
    return json.dumps([_plain(record) for record in _named(ids)], indent=2)


def clear(ids: Iterable[str], stale: bool) -> str:
    """Remove records, and say how many: those with these ids; or all, or all that this version does not use."""
    found, others = records.on_disk()
    if ids:
        places = [record.path for record in _named(ids)]
    else:
        places = [record.path for record in found if _is_stale(record) or not stale] + others
    for place in places:
        place.unlink(missing_ok=True)
    return f"{len(places)} removed from {files.directory()}"


def write_to(place: Path, ids: Iterable[str]) -> str:
    """Write records into one file: those with these ids, or all that this version uses."""
    chosen = _named(ids) if ids else [record for record in records.on_disk()[0] if not _is_stale(record)]
    if not chosen:
        raise TokenWeaveError(f"nothing was tuned by this version on this machine: {files.directory()} has no plan of {agree.version()}")
    try:
        place.write_text(json.dumps({"format": _FORMAT, "records": [_plain(record) for record in chosen]}, indent=1))
    except OSError as error:
        raise TokenWeaveError(f"{place} cannot be written: {error.strerror}") from error
    return f"{len(chosen)} plans written to {place}"


def read_from(place: Path) -> str:
    """Take over the records of such a file, in place of those that this machine has for the same. All of them, or none.

    Raises TokenWeaveError for a file that is not whole, or that has what is no record.
    """
    try:
        data = json.loads(place.read_bytes())
    except OSError as error:
        raise TokenWeaveError(f"{place} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TokenWeaveError(f"{place} is not JSON, or not whole: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT or not isinstance(data.get("records"), list):
        raise TokenWeaveError(f"{place} is not a file of tw-compile plans export")
    found = []
    for number, each in enumerate(data["records"]):
        try:
            found.append(_checked(Record(**each)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TokenWeaveError(f"{place}: record {number} is not valid ({error}); nothing was imported") from error
    for record in found:
        if not records.write(record.kind, record.key, record.value):
            raise TokenWeaveError(f"{files.directory()} cannot be written")
    unused = sum(map(_is_stale, found))
    told = f"; {unused} of them are not used, as they are not of {agree.version()}" if unused else ""
    return f"{len(found)} plans imported into {files.directory()}{told}"


def _named(ids: Iterable[str]) -> list[Record]:
    found = {record.id: record for record in records.on_disk()[0]}
    for each in ids:
        if each not in found:
            raise TokenWeaveError(f"there is no plan {each!r} in {files.directory()}: see tw-compile plans list")
    return [found[each] for each in dict.fromkeys(ids)]


def _plain(record: Record) -> dict:
    return {"kind": record.kind, "key": record.key, "value": record.value}


def _is_stale(record: Record) -> bool:
    return record.key.get("version") != agree.version()


def _gpus(key: dict) -> str:
    return f"{key.get('ranks')} × {key.get('gpu')}"


def _summary(record: Record) -> tuple[str, str]:
    """What a record is for, and what it says."""
    try:
        _checked(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return "?", f"not valid: {error}"
    key, value = record.key, record.value
    if record.kind == "plan":
        section = key["section"]
        return f"{key['transport']}, {section['hidden']} {section['dtype']}, {_sizes(section['sizes'])}", plan_text(**value)
    if record.kind == "tuning":
        return f"{key['transport']}, {key['hidden']} {key['dtype']}", f"one_shot up to {value['one_shot_rows']} tokens"
    return "a call over each", ", ".join(f"{name} {1e6 * seconds:.0f} µs" for name, seconds in value.items())


def _sizes(sizes: list[int]) -> str:
    return f"{sizes[0]} tokens" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} tokens"


# --- whether a record is one: what a file from elsewhere says becomes the number of CTAs of a kernel ---------------------------------


def _checked(record: Record) -> Record:
    """The record. Raises ValueError, TypeError, KeyError or AttributeError where it is none."""
    if record.kind not in records.KINDS:
        raise ValueError(f"kind {record.kind!r}")
    key, value = record.key, record.value
    for name, kind in {"gpu": str, "ranks": int, "version": str}.items():
        _expect(name, key[name], type(key[name]) is kind)
    {"plan": _check_plan, "tuning": _check_tuning, "transports": _check_transports}[record.kind](key, value)
    return record


def _check_plan(key: dict, value: dict) -> None:
    Section.from_dict(key["section"])
    _expect("transport", key["transport"], isinstance(key["transport"], str))
    plan = Plan(**value)
    _expect("min_tokens", plan.min_tokens, plan.min_tokens is None or _is_number(plan.min_tokens, 1))
    _expect("ctas", plan.ctas, _is_number(plan.ctas, 0))
    _expect("split_ratio", plan.split_ratio, type(plan.split_ratio) is float and 0 < plan.split_ratio < 1)
    _expect("gain", plan.gain, type(plan.gain) in (int, float) and plan.gain > 0)


def _check_tuning(key: dict, value: dict) -> None:
    _expect("hidden", key["hidden"], _is_number(key["hidden"], 1))
    _expect("transport", key["transport"], isinstance(key["transport"], str))
    _expect("dtype", key["dtype"], isinstance(key["dtype"], str))
    tuning = Tuning.from_dict(value)
    _expect("one_shot_rows", tuning.one_shot_rows, _is_number(tuning.one_shot_rows, 0))
    firsts = [first for first, _ in tuning.ctas]
    whole = all(_is_number(n, 1) for step in tuning.ctas for n in step)
    _expect("ctas", value["ctas"], whole and firsts[:1] == [1] and firsts == sorted(set(firsts)))


def _check_transports(key: dict, value: dict) -> None:
    _expect("transports", key["transports"], isinstance(key["transports"], list) and set(key["transports"]) == set(value))
    _expect("seconds", value, all(type(seconds) in (int, float) and seconds > 0 for seconds in value.values()))


def _is_number(given: object, least: int) -> bool:
    return type(given) is int and given >= least


def _expect(name: str, given: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} is {given!r}")
