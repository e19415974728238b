"""The package's docstrings as Markdown, for the API reference: ``name: text`` becomes an entry of a list."""

import re

import griffe

ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): +(?P<text>.*)")


class Fields(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Lines such as ``mode: auto weaves ...``, each with the indented lines that continue it, as entries of a list."""
    lines, inside = [], False
    for line in text.splitlines():
        entry = ENTRY.match(line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry["names"].split(", "))
            lines += [*([""] if not inside else []), f"- {names}: {entry['text']}"]
            inside = True
        elif inside and line.startswith(" "):
            lines.append("  " + line.strip())
        else:
            lines += ["", line] if inside and line.strip() else [line]
            inside = False
    return "\n".join(lines).replace("``", "`")
