"""tw-compile plans: what was tuned here is listed, shown, removed, and shipped to other machines."""

import json
import stat
from pathlib import Path

import pytest

from tw_compile import cli, records
from tw_compile.transports import agree

H200 = {"gpu": "NVIDIA H200", "ranks": 4}
SECTION = {
    "hidden": 8192, "dtype": "bfloat16", "sizes": [256, 512], "sequences": 1, "ctas": 0,
    "phases": [[["mm", 64, 8192]]], "cuda_graphs": True,
}  # fmt: skip
PLAN = {"min_tokens": 1024, "ctas": 6, "split_ratio": 0.625, "gain": 1.12}
TUNING = {"one_shot_rows": 16, "ctas": [[1, 32], [513, 8]]}
SECONDS = {"peer": 2e-5, "process_group": 5e-5}


def keys(version):
    of = {**H200, "version": version}
    return {
        "plan": {"section": SECTION, "requested": "auto", "transport": "peer", "link": "4 ranks, 256 to 1024 GB/s", **of},
        "tuning": {"transport": "peer", "dtype": "bfloat16", "hidden": 8192, **of},
        "transports": {"transports": [*SECONDS], **of},
    }


VALUES = {"plan": PLAN, "tuning": TUNING, "transports": SECONDS}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Goes to a machine, which has its own cache: (name, whether something was tuned there) -> its folder."""

    def go_to(name, tuned=True, version=agree.version()):
        monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path / name))
        for kind, key in keys(version).items() if tuned else ():
            assert records.write(kind, key, VALUES[kind])
        return tmp_path / name

    return go_to


def run(capsys, *arguments):
    """(exit status, what was printed) of tw-compile plans"""
    status = cli.main(["plans", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out + said.err


def ids(capsys):
    _, said = run(capsys, "list")
    return {line.split()[1]: line.split()[0] for line in said.splitlines()[1:] if "files" not in line}


def test_list(machine, capsys):
    folder = machine("a")
    status, said = run(capsys, "list")
    assert status == 0 and said.startswith(f"3 plans in {folder}\n")
    plan, tuning, transports = said.splitlines()[1:]
    assert "plan        4 × NVIDIA H200  peer, 8192 bfloat16, 256 to 512 tokens" in plan
    assert "woven from 1024 tokens on, with split ratio 0.625, 6 CTAs: 1.12 times as fast" in plan
    assert "peer, 8192 bfloat16" in tuning and "one_shot up to 16 tokens" in tuning
    assert "peer 20 µs, process_group 50 µs" in transports


def test_nothing_was_tuned(machine, capsys, tmp_path):
    folder = machine("a", tuned=False)
    assert run(capsys, "list") == (0, f"0 plans in {folder}\n")
    status, said = run(capsys, "export", tmp_path / "file")
    assert status == 1 and said.startswith("tw-compile: there is no plan to export") and not (tmp_path / "file").exists()


def test_show(machine, capsys):
    machine("a")
    status, said = run(capsys, "show", ids(capsys)["plan"])
    assert status == 0 and json.loads(said) == [{"kind": "plan", "key": keys(agree.version())["plan"], "value": PLAN}]
    assert run(capsys, "show", "nothing")[0] == 1


def test_clear(machine, capsys):
    folder = machine("a")
    assert run(capsys, "clear", ids(capsys)["tuning"])[1] == f"1 file removed from {folder}\n"
    assert set(ids(capsys)) == {"plan", "transports"}
    machine("a", version="of last year")
    (folder / "plan-0.json").write_text(json.dumps(PLAN))  # as earlier versions wrote it, without a key
    _, said = run(capsys, "list")
    assert said.count("not used: from of last year") == 3 and "1 unusable file, damaged or of an earlier version" in said
    run(capsys, "clear", "--stale")
    assert set(ids(capsys)) == {"plan", "transports"} and len([*folder.iterdir()]) == 2
    run(capsys, "clear")
    assert [*folder.iterdir()] == []


def test_a_plan_with_the_key_of_an_earlier_version(machine, capsys):
    machine("a", tuned=False)
    of = {"section": SECTION, "transport": "auto", "carrier": "peer", **H200, "version": "of last year"}
    assert records.write("plan", of, PLAN)
    (line,) = run(capsys, "list")[1].splitlines()[1:]
    assert "auto, 8192 bfloat16" in line and "1.12 times as fast" in line and "not used: from of last year" in line
    assert json.loads(run(capsys, "show", ids(capsys)["plan"])[1])[0]["key"] == of
    run(capsys, "clear", "--stale")
    assert not ids(capsys)


def test_what_cannot_be_cleared(machine, capsys, monkeypatch):
    machine("a")
    status, said = run(capsys, "clear", ids(capsys)["plan"], "--stale")
    assert (status, said) == (1, "tw-compile: plans clear takes ids or --stale, not both\n")

    def unlink(path, missing_ok):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    status, said = run(capsys, "clear")
    assert status == 1 and said.endswith(" cannot be removed: Permission denied\n")


def test_a_cache_that_cannot_be_written(machine, capsys, tmp_path, monkeypatch):
    machine("a")
    assert run(capsys, "export", tmp_path / "plans.json")[0] == 0
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path / "plans.json" / "cache"))
    status, said = run(capsys, "import", tmp_path / "plans.json")
    assert status == 1 and "cannot be written: Not a directory. Set TW_COMPILE_CACHE_DIR to another directory" in said


def test_a_fleet(machine, capsys, tmp_path):
    file = tmp_path / "plans.json"
    machine("a", version="of last year")
    machine("a")
    assert run(capsys, "export", file) == (0, f"3 plans written to {file}\n"), "only those that are used"
    folder = machine("b", tuned=False)
    assert run(capsys, "import", file) == (0, f"3 plans imported into {folder}\n")
    for kind, key in keys(agree.version()).items():
        assert records.read(kind, key) == VALUES[kind]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_some_and_of_another_version(machine, capsys, tmp_path):
    file = tmp_path / "plans.json"
    machine("a", version="of last year")
    assert run(capsys, "export", file, ids(capsys)["plan"])[0] == 0
    machine("b", tuned=False)
    assert "; 1 plan will not be used: from another version than" in run(capsys, "import", file)[1]


def exported(**record):
    return json.dumps({"format": "tw_compile plans 1", "records": [record]})


def changed(of, **changes):
    """An export with one value that is changed."""
    return exported(kind=of, key=keys("v")[of], value=VALUES[of] | changes)


BAD = {
    "is not JSON, or is incomplete": "{",
    "was not written by tw-compile plans export": "[]",
    "record 0 is not valid (kind 'host')": exported(kind="host", key={}, value={}),
    "record 0 is not valid (it has no 'gpu')": exported(kind="plan", key={}, value={}),
    "ctas is 'many'": changed("plan", ctas="many"),
    "split_ratio is 2.0": changed("plan", split_ratio=2.0),
    "unexpected keyword argument 'more'": changed("plan", more=1),
    "there is room for 31": changed("tuning", one_shot_rows=500),
    "ctas is [[2, 8]]": changed("tuning", ctas=[[2, 8]]),
    "seconds is {'peer': -1, 'process_group': 5e-05}": changed("transports", peer=-1),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_file_that_is_bad_changes_nothing(machine, capsys, tmp_path, reason):
    file, folder = tmp_path / "plans.json", machine("a", tuned=False)
    file.write_text(BAD[reason])
    status, said = run(capsys, "import", file)
    assert status == 1 and said.count("\n") == 1 and f"tw-compile: {file}" in said and reason in said
    assert not folder.exists()


def test_a_file_that_is_not_there(machine, capsys, tmp_path):
    machine("a", tuned=False)
    assert run(capsys, "import", tmp_path / "none") == (1, f"tw-compile: {tmp_path / 'none'} cannot be read: No such file or directory\n")
