"""The protocol of the kernels, model-checked: protocol.pml says what is modelled, and spin goes through all that can happen."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("protocol.pml")



def missing() -> str | None:
    """Why there is nothing to check with, if so."""
    if shutil.which("cc") is None:
        return "no C compiler, which spin needs"
    # There are other programs of this name.
    if shutil.which("spin") is None or "Spin Version" not in subprocess.run(["spin", "-V"], capture_output=True, text=True).stdout:
        return "no spin, the model checker: apt-get install spin"
    return None


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# What each mistake is noticed by, with two ranks.
MISTAKES = {
    "NO_ENTRY_BARRIER": "read_before_write",
    "NO_EXIT_BARRIER": "stale_norm",
    "ARRIVE_BEFORE_READS": "stale_norm",
    "ARRIVE_BEFORE_STORES": "stale_norm",
    "FLAG_WITHOUT_RELEASE": "read_before_write",  # which is a flag that may overtake the data
    "FLAG_WITHOUT_ACQUIRE": "read_before_write",
    "FLAGS_RESET": "invalid end state",
    "EPOCH_NOT_STORED": "read_before_write",
    "ONE_STAGING_PLACE": "overwrite_before_read",
    "WAIT_FOR_EQUAL": "invalid end state",
    "WAIT_UNSIGNED": "stale_norm",
    "WAIT_ONE_SHORT": "read_before_write",
    "CTAS_IN_ANY_ORDER SMS=1": "invalid end state",
}


def check(directory: Path, macros: str, optimise: str) -> tuple[str | None, str]:
    """(first error or None, all that the checker printed)."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    run("spin", "-Pcc -E -x c", *(f"-D{macro}" for macro in macros.split()), "-a", str(MODEL))
    run("cc", optimise, "-w", "-DSAFETY", "-DMEMLIM=1800", "-o", "pan", "pan.c")
    out = run("./pan", "-m10000", "-w22")
    error = re.search(r"^pan:1: (?:assertion violated\s+\W*(\w+)|(invalid end state))", out, re.MULTILINE)
    return error and (error[1] or error[2]), out


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "macros",
    (
        "RANKS=2 CTAS=2 CALLS=3",
        "RANKS=2 CTAS=2 CALLS=3 SMS=1",
        "RANKS=3 CTAS=1 CALLS=4",
        "RANKS=3 CTAS=2 CALLS=2 SMS=1",
        "RANKS=4 CTAS=1 CALLS=3",
    ),
)
def test_protocol(macros, tmp_path):
    error, out = check(tmp_path, macros, "-O2")
    assert error is None, out
    assert "errors: 0" in out and "not completed" not in out and "too small" not in out, out
    # Every step of the model was taken; only a CTA's process never ends.
    assert re.findall(r"^\t.*protocol.pml:\d+, state \d+, \"(.*)\"", out, re.MULTILINE) == ["-end-"], out
    print(re.search(r"(\d+) states, stored", out)[0])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, tmp_path):
    error, out = check(tmp_path, mistake, "-O0")
    assert error == MISTAKES[mistake], out
