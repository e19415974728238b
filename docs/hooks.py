"""What mkdocs.yml cannot say: pages and pictures from outside of docs/, with links that hold on the site and in the repository.

CONTRIBUTING.md, CHANGELOG.md and SECURITY.md become pages, and the plots of benchmarks/results are copied.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
PLOTS = "benchmarks/results/"


def on_files(files, config):
    for source, page in PAGES.items():
        text = (ROOT / source).read_text().replace(f"]({PLOTS}", "](plots/")
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    for plot in sorted((ROOT / PLOTS).glob("*.svg")):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the repository has them -> as the site has them."""
    markdown = markdown.replace(f"](../{PLOTS}", "](plots/")
    for source, name in PAGES.items():
        markdown = re.sub(rf"\]\((\.\./)?{source}", f"]({name}", markdown)
    return markdown
