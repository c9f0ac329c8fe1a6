"""Where the system has no fcntl (Windows), everything but the launcher of several processes still opens."""
import subprocess
import sys

CODE = """
import sys
sys.modules["fcntl"] = None      # importing it raises ImportError
import importlib, pathlib, tempfile
for name in "data shards benchmarks training hub doors probing finetuning alias_lab window_dashboard".split():
    importlib.import_module("aasp_nb." + name)
from aasp_nb.runs import RunDir
with tempfile.TemporaryDirectory() as folder: RunDir(pathlib.Path(folder) / "run").close()
print("opened")
"""


def test_opens_without_fcntl():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0 and "opened" in done.stdout, done.stderr[-2000:]
