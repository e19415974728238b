"""Which messages of the package are not in docs/troubleshooting.md or docs/report.md. `make docs` runs it; exit status 1 if there are any.

A message is a string with three words or more in a row, that is no docstring. It is there if one such part of it is. Help texts (cli.py),
findings of the doctor, which come with advice, and markup (html.py) are not looked at.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PAGES = "troubleshooting.md", "report.md"
NO_MESSAGES = "cli.py", "doctor.py", "html.py"

# Strings that users do not see, or that are on the pages in parts.
NO_MESSAGE = re.compile(
    r"Tensor|float eps|int slot|bool fp32_residual|str transport|^[\w.]+ \| [\w.]+$|^from tw_compile"  # schemas, types, generated code
    r"|^seconds of \(kernel|^a wire of %d bits over"  # INFO and DEBUG
    r"|^(compared transports|tuned|schedule autotuned).* in %.1f s|fused %s s"  # INFO and DEBUG
    r"|^tw_compile plans 1$"  # format of a file
    r"|^a graph could not be rewritten$|^nothing of these$|^mode is fuse$"
)


def main():
    documented = " ".join(" ".join((HERE / page).read_text() for page in PAGES).split())
    missing = 0
    for path in sorted((HERE.parent / "tw_compile").rglob("*.py")):
        if path.name in NO_MESSAGES:
            continue
        for line, message in messages(ast.parse(path.read_text())):
            parts = [part.strip(" :;,.?()[]\n") for part in re.split(r"\0|\{\}|%s|%d|%\.\df|\n", message)]
            parts = [part for part in parts if part.count(" ") > 1]
            if parts and not any(part in documented for part in parts) and not NO_MESSAGE.search(message.replace("\0", "…")):
                missing += 1
                print(f"{path.relative_to(HERE.parent)}:{line}: not in {' or '.join(PAGES)}: {max(parts, key=len)}")
    sys.exit(1 if missing else 0)


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of each string, with a null character for each value in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        else:
            yield from messages(node)


if __name__ == "__main__":
    main()
