"""The layout of the package: who may import whom, and how long a file may be."""

import ast
from pathlib import Path

import pytest

import tw_compile

ROOT = Path(tw_compile.__file__).parent
MOST_LINES = 400

# Each module imports only from those on lines below its own. A package is its __init__, which Python also runs before its modules: that
# does not count here.
LAYERS = """
__main__
cli
integrations
integrations.vllm
integrations.vllm.plugin
integrations.vllm.attention
integrations.vllm.rows
plans
doctor
environment
__init__
warmup
verify
explain
backend
forms
variants
sent
regions
breaks
sizes
context

passes
passes.section
passes.keep
passes.fingerprint
passes.outline
passes.layers
passes.expand
passes.place
passes.weave
passes.conform
passes.split
passes.halves
passes.cut
passes.unshard
passes.merge
passes.quantise
passes.replicated
passes.fuse
passes.plain
passes.rules
passes.rules.algebra
passes.rules.arrange
passes.rules.copies
passes.rules.experts
passes.rules.index
passes.rules.rows
passes.rules.paged
passes.rules.functional
passes.rules.attention
passes.rules.quantised
passes.rules.cache
passes.rules.put
passes.rules.mask
passes.rules.gather
passes.rules.token_axis
passes.rules.per_half
passes.find
passes.linear
passes.norms
passes.emit
passes.graph_utils

autotune
autotune.schedule
autotune.operands
autotune.plan

ops.lowering
ops
ops.direct

transports
transports.choose
transports.chains
transports.low_bit
transports.low_bit.threshold
transports.hierarchical
transports.low_bit.transport
transports.low_bit.kernels
transports.low_bit.codec
transports.beside
transports.process_group
transports.norm_kernel
transports.link
transports.symmetric
transports.symmetric.transport
transports.symmetric.launch
transports.symmetric.workspace
transports.symmetric.arguments
transports.symmetric.layout
transports.symmetric.tuning
transports.symmetric.support
transports.symmetric.nvrtc
transports.symmetric.host
transports.symmetric.gemms
transports.together
transports.agree

site
quantise
options
report
html
wording
records
logs
files
compat
""".split()  # noqa: SIM905  # one a line


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules of the package that one imports, anywhere in it."""
    path, found = FILES[name], set()
    package = [*path.parent.relative_to(ROOT.parent).parts]
    for node in _run(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])]) if node.level else node.module
            # What is imported from a package is a module of it, or a name that its __init__ has.
            found.update(f"{base}.{alias.name}" if module(f"{base}.{alias.name}") in FILES else base for alias in node.names)
    return {module(each) for each in found if each.split(".")[0] == ROOT.name}


def _run(tree: ast.AST):
    """The nodes of a module, without what only type checkers see."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield from _run(node)


def module(dotted: str) -> str:
    return dotted.removeprefix(ROOT.name).removeprefix(".") or "__init__"


def test_every_module_has_a_place():
    assert sorted(LAYERS) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    """So there is no circle either."""
    up = {other for other in imports(name) if LAYERS.index(other) <= LAYERS.index(name)}
    assert not up, f"{name} imports from the same or a higher layer"


SOURCES = [*FILES.values(), *sorted((ROOT / "csrc").iterdir())]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, f"{lines} lines"


def test_imports_are_seen():
    assert {"context", "compat", "autotune.plan", "passes.find", "transports.choose"} <= imports("forms")
    assert {"transports.choose"} == imports("ops.direct")


def test_scripts_have_names_of_their_own():
    """Tests import benchmarks and examples by name: of two equal names, one would hide the other."""
    paths = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT.parent / folder).glob("*.py")]
    assert len({path.name for path in paths}) == len(paths)
