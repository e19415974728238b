"""The package as it is installed: a wheel has all files, and works without the checkout, in an environment of its own."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = sys.executable, "-m", "pip", "--disable-pip-version-check"
OWN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

USED = """
import importlib.metadata, pathlib, sys
import tokenweave, tw_compile
from tw_compile.transports.symmetric import host
assert str(tw_compile.__file__).startswith(sys.argv[1]), tw_compile.__file__
assert {path.suffix for path in host.SOURCES.iterdir()} == {".cu", ".cuh", ".c"}
points = importlib.metadata.distribution("tw_compile").entry_points
print(sorted((point.group, point.name) for point in points), importlib.metadata.version("tw_compile"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\0")
    files = [Path(name) for name in names if name] or [path.relative_to(ROOT) for path in ROOT.rglob("*.*")]
    for path in files:
        if path.parts[0] in ("tw_compile", "setup.py", "tokenweave.py", "pyproject.toml") and (ROOT / path).is_file():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes((ROOT / path).read_bytes())
    how = "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder
    done = subprocess.run([*PIP, "wheel", *how, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_has_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith(("tw_compile/", "tokenweave"))}
    suffixes = (".py", ".cu", ".cuh", ".c", ".typed")
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "tw_compile").rglob("*") if path.suffix in suffixes or path.name == "py.typed"}
    assert packed == here | {"tokenweave.py"}


@pytest.fixture
def environment(tmp_path, wheel):
    """A new environment with the wheel. Behind its own packages it sees those of this one, such as torch and pip, by a .pth file."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    how = "--disable-pip-version-check", "--quiet", "--no-index", "--no-deps", "--ignore-installed"
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", *how, wheel], env=OWN, check=True)
    return folder


@pytest.mark.slow
def test_what_is_installed_is_complete(environment, tmp_path):
    def run(*command):
        done = subprocess.run(command, env=OWN, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    used = run(environment / "bin" / "python", "-c", USED, str(environment))
    assert "('torch_dynamo_backends', 'tokenweave'), ('vllm.general_plugins', 'tokenweave')] 0.2.0" in used
    assert "plans" in run(environment / "bin" / "tw-compile", "--help")
