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


LEAN = """
import sys, traceback
ALLOWED = {"aasp_nb", "torch", "torchaudio", "numpy", "soundfile", "safetensors"}
class Only:
    "Refuses what the package itself asks for beside the five; what they need of their own is theirs."
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in ALLOWED or top in sys.stdlib_module_names: return None
        asks = [f.filename for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename]
        if asks and "aasp_nb" in asks[-1].split("/")[-2:-1]: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Only())
from aasp_nb.clips import write_clips
from aasp_nb.encoders import AaSPEncoder, load_encoder
from aasp_nb.pretraining import pretrain
data = write_clips(sys.argv[1] + "/clips", per_class=1, seed=0, seconds=1.0)
out = pretrain("nano", data, sys.argv[1] + "/run", device="cpu", progress="text", monitor=data, workers=0)
assert out["status"] == "finished", out
print(AaSPEncoder(*load_encoder(sys.argv[1] + "/run")).embed(__import__("torch").zeros(16000), 16000).scene.shape)
try: import timm
except ModuleNotFoundError: print("nothing else")  # asked for by this script, not by the package: timm is there
else: print("nothing else was asked for")
"""


def test_training_needs_five_packages(tmp_path):
    "torch, torchaudio, numpy, soundfile, safetensors: pre-training with a monitor, and opening what it made."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AASP_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", LEAN, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=900)
    assert done.returncode == 0 and "nothing else was asked for" in done.stdout, (done.stdout + done.stderr)[-3000:]


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
    for kind in ("runs", "dashboards", "lessons"): shutil.copytree(ROOT / "nbs" / kind, tree / "nbs" / kind)
    for name in ("setup.py", "settings.ini", "pyproject.toml", "constraints.txt", "MANIFEST.in", "README.md", "LICENSE"):
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
    with zipfile.ZipFile(wheel) as z:
        for kind in ("runs", "dashboards", "lessons"):  # copies of what lies in nbs, made when the wheel is built
            have = {Path(n).name: z.read(n) for n in packed if f"assets/notebooks/{kind}/" in n}
            assert have == {p.name: p.read_bytes() for p in (ROOT / "nbs" / kind).glob("*.ipynb")} and have
    assert not [n for n in packed if n.startswith(("nbs/", "tests/", "figures/")) or "__pycache__" in n]
    with zipfile.ZipFile(wheel) as z:
        assert "aasp = aasp_nb.cli:main" in z.read(next(n for n in packed if n.endswith("entry_points.txt"))).decode()
    assert wheel.stat().st_size < 12e6  # of which the named checkpoint is half


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


def test_pyproject_says_what_settings_say():
    sys.path.insert(0, str(ROOT / "tests"))
    from build_pyproject import pyproject
    assert (ROOT / "pyproject.toml").read_text(encoding="utf-8") == pyproject(), "python tests/build_pyproject.py"


@pytest.mark.slow
def test_the_next_nbdev_exports_the_same(tmp_path):
    "nbdev 3 reads pyproject.toml alone; in an environment of its own its export leaves no difference."
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    got = subprocess.run([tmp_path / "venv" / "bin" / "pip", "install", "-q", "nbdev>=3,<4"], capture_output=True, text=True, timeout=900)
    if got.returncode: pytest.skip(f"SKIPPED: nbdev 3 cannot be installed here ({got.stderr.strip()[-100:]})")
    for name in ("aasp_nb", "nbs"): shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml", "setup.py"): shutil.copy(ROOT / name, tmp_path / "tree" / name)
    read = lambda: {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "tree").rglob("*") if p.suffix in (".py", ".ipynb")}
    before = read()
    run(tmp_path / "venv" / "bin" / "nbdev-export", cwd=tmp_path / "tree")
    after = read()
    assert [n for n in before if after.get(n) != before[n]] == [] and set(after) == set(before)
