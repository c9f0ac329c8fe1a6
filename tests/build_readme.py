"""README.md is made from nbs/index.ipynb; `--check` says whether the two agree."""
import argparse
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme_text() -> str:
    "The markdown of nbs/index.ipynb with paths seen from the repository's root."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith(("#| hide", "---\n"))]
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = body.replace("](../", "](").replace('src="../', 'src="')
    note = "<!-- Made from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n"
    return note + body.strip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    target = ROOT / "README.md"
    if parser.parse_args().check:
        same = target.exists() and target.read_text(encoding="utf-8") == readme_text()
        sys.exit(0 if same else "README.md differs from nbs/index.ipynb: run `make readme`")
    target.write_text(readme_text(), encoding="utf-8")
    print(f"wrote {target.name}")
