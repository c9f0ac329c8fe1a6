"""The source archive, the wheel made from it, and the package in an environment that does not know the repository."""
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASSETS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "aasp_nb" / "assets").rglob("*") if p.is_file())
CHECK = """
import sys, warnings
from pathlib import Path
import aasp_nb
assert Path(aasp_nb.__file__).is_relative_to(sys.prefix), aasp_nb.__file__
from aasp_nb.ablation_dashboard import AblationDashboard
from aasp_nb.patch_dashboard import CHECKPOINTS, PatchDashboard
from aasp_nb.window_dashboard import WindowDashboard
for made in (AblationDashboard(), WindowDashboard(), *(PatchDashboard(checkpoint=c) for c in CHECKPOINTS)):
    assert made.result is not None and made.toolbar.error == "", made.toolbar.error
from aasp_nb.encoders import AaSPEncoder
from aasp_nb.doors import DEMO, load_model
assert Path(DEMO).is_relative_to(sys.prefix)
import torch
print("scene", tuple(load_model(DEMO).embed(torch.zeros(16000), 16000).scene.shape))
"""


def run(*command, **kwargs):
    "Run a command; its output stands in the failure."
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900, **kwargs)
    assert done.returncode == 0, f"{command[:3]}: {(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A source archive of a copy of the tree, and a wheel made from that archive."
    home = tmp_path_factory.mktemp("package")
    tree = home / "tree"
    shutil.copytree(ROOT / "aasp_nb", tree / "aasp_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "constraints.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", home / "dist", cwd=tree)
    source = next((home / "dist").glob("*.tar.gz"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", home / "dist", source,
        cwd=home)
    return source, next((home / "dist").glob("*.whl"))


@pytest.mark.slow
def test_assets_are_in_both(built):
    "Every file of the assets, and the console script."
    source, wheel = built
    with tarfile.open(source) as t: names = [n.partition("/")[2] for n in t.getnames()]
    with zipfile.ZipFile(wheel) as z: packed = z.namelist()
    assert len(ASSETS) >= 7 and not set(ASSETS) - set(names) and not set(ASSETS) - set(packed)
    assert not [n for n in packed if n.startswith(("nbs/", "tests/", "figures/")) or "__pycache__" in n]
    with zipfile.ZipFile(wheel) as z:
        assert "aasp = aasp_nb.cli:main" in z.read(next(n for n in packed if n.endswith("entry_points.txt"))).decode()
    assert wheel.stat().st_size < 5e6


@pytest.mark.slow
def test_wheel_in_a_clean_environment(built, tmp_path):
    "Installed without the repository in sight, dashboards, checkpoints and example results open."
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    site = next((venv / "lib").glob("python*")) / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # dependencies; .pth files there are not read
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run(sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "-q", "--no-deps", "--no-index", built[1],
        cwd=tmp_path, env=env)
    assert "scene" in run(venv / "bin" / "python", "-c", CHECK, cwd=tmp_path, env=env)
    assert "run" in run(venv / "bin" / "aasp", "--help", cwd=tmp_path, env=env)
