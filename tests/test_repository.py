"""What holds the repository together: versions, README, parameter tags, licences."""
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNS = sorted((ROOT / "nbs" / "runs").glob("*.ipynb"))
GUIDES = RUNS + sorted((ROOT / "nbs" / "dashboards").glob("*.ipynb")) + sorted((ROOT / "nbs" / "lessons").glob("*.ipynb"))


def test_torch_family_imports_together():
    "An unpinned member of the family breaks torchaudio's import while `pip check` is content."
    code = "import torch, torchaudio, torchvision, timm; print(torch.__version__, torchaudio.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert [v.split("+")[0].rsplit(".", 1)[0] for v in out.stdout.split()] == ["2.11", "2.11"]


def test_readme_is_made_from_index():
    out = subprocess.run([sys.executable, ROOT / "tests" / "build_readme.py", "--check"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_readme_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert local, "README has no local link at all"
    assert not [t for t in local if not (ROOT / t).exists()]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_run_notebook_has_parameters_tag(path):
    tags = [c.metadata.get("tags", []) for c in nbformat.read(path, 4).cells]
    assert sum("parameters" in t for t in tags) == 1


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_guides_are_left_to_papermill(path):
    raw = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "raw"]
    assert len(raw) == 1 and "skip_exec: true" in raw[0]


def test_requirements_have_no_spaces_inside():
    cfg = ConfigParser(delimiters=["="], interpolation=None); cfg.read(ROOT / "settings.ini")
    for key in ("requirements", "dev_requirements"):
        for req in cfg["DEFAULT"][key].split(): assert re.match(r"^[A-Za-z0-9_.-]+([<>=!~].*)?$", req), req


def test_no_path_of_a_machine():
    "No tracked text names a home or working folder of the machine it was written on."
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    needles = [str(ROOT.parent) + "/", str(Path.home()) + "/."]
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in {".png", ".safetensors", ".npz"} or not path.exists(): continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for needle in needles: assert needle not in text, f"{name} names {needle}"


def test_no_number_of_the_paper_is_mistyped():
    "Every number of Tables I to VIII in this package, where the paper's tables lie beside the checkout; a changed digit is found."
    folder = Path(os.environ.get("AASP_PAPER", ROOT.parent / "shared" / "paper")) / "tables"
    if not (folder / "table5_patch_embedding.csv").is_file(): pytest.skip("the paper's tables are not here (AASP_PAPER)")
    from aasp_nb import reproduce
    assert reproduce.check_paper(folder) == []


@pytest.mark.parametrize("number", ["III", "V", "VIII"])
def test_a_mistyped_number_is_found(number, monkeypatch):
    folder = Path(os.environ.get("AASP_PAPER", ROOT.parent / "shared" / "paper")) / "tables"
    if not (folder / "table5_patch_embedding.csv").is_file(): pytest.skip("the paper's tables are not here (AASP_PAPER)")
    from aasp_nb import reproduce
    if number == "III":
        rows = [*reproduce.TABLE_3["rows"][:-1], ("AaPE", 87, 49.8, 41.9, 95.7, 97.9)]
        monkeypatch.setitem(reproduce.TABLE_3, "rows", rows)
    else: monkeypatch.setitem(reproduce.PAPER_TABLES[number]["rows"][0]["paper"], "esc50", 99.9)
    found = reproduce.check_paper(folder)
    assert len(found) == 1 and found[0].startswith(f"Table {number}"), found
