"""Writes pyproject.toml from settings.ini, which stays the only place for names, versions and requirements.

`python tests/build_pyproject.py` writes it; `--check` fails where it is not what settings.ini says. nbdev 2 reads settings.ini, nbdev 3
reads [tool.nbdev]; pip and build tools read setup.py through [build-system].
"""
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("lib_path", "nbs_path", "doc_path", "title", "readme_nb", "branch")
LISTS = ("tst_flags", "allowed_metadata_keys", "allowed_cell_metadata_keys")
SWITCHES = ("custom_sidebar", "recursive", "jupyter_hooks", "clean_ids", "clear_all", "put_version_in_init")


def pyproject() -> str:
    "Contents of pyproject.toml."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    c = parser["DEFAULT"]
    lines = ["# made from settings.ini by tests/build_pyproject.py: change it there",
             "[build-system]", 'requires = ["setuptools>=68"]', 'build-backend = "setuptools.build_meta"', "",
             "[project]", f'name = "{c["lib_name"]}"', f'requires-python = ">={c["min_python"]}"',
             'dynamic = ["version", "description", "readme", "license", "authors", "keywords", "dependencies", "optional-dependencies",',
             '           "entry-points", "scripts"]', "",
             "[project.urls]", f'Repository = "{c["git_url"]}"', "", "[tool.nbdev]"]
    lines += [f'{k} = "{c[k]}"' for k in TEXTS]
    lines += [f'{k} = "{c[k]}"' for k in LISTS if c[k]]
    lines += [f"{k} = {str(c[k] == 'True').lower()}" for k in SWITCHES]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = ROOT / "pyproject.toml"
    if "--check" not in sys.argv: target.write_text(pyproject(), encoding="utf-8")
    elif not target.is_file() or target.read_text(encoding="utf-8") != pyproject():
        sys.exit("pyproject.toml is not what settings.ini says: python tests/build_pyproject.py")
