"""The runner behind `make gpu`, as far as it goes without a GPU."""
import json
import os
import subprocess
import sys

import gpu
import pytest
import torch

# What a machine with PyTorch alone has, and the wheels that travel; import names
THERE = set("torch torchvision torchaudio numpy safetensors huggingface_hub triton torchgen functorch".split())
WHEELS = {"fastcore", "timm", "soundfile", "_soundfile_data", "cffi", "pycparser", "pytest", "iniconfig", "pluggy", "pygments", "packaging", "yaml", "psutil"}

STRANGERS = """
import builtins, sys
sys.path[:0] = {path!r}
allowed, real = {allowed!r}, builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):  # refuses what our own files import beyond `allowed`
    asker, top = (globals or {{}}).get("__file__") or (globals or {{}}).get("__name__", ""), name.partition(".")[0]
    ours = asker == "__main__" or "/aasp_nb/" in asker or "/tests/" in asker
    if ours and not level and top not in allowed and top not in sys.stdlib_module_names: raise ImportError("not on a GPU machine: " + name)
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
import gpu
{work}
"""


def alone(work: str) -> subprocess.CompletedProcess:
    "Run Python where our files can import only what a GPU machine has."
    path = [str(gpu.ROOT / "tests"), str(gpu.ROOT)]
    own = {"aasp_nb", "gpu", *(f.removeprefix("tests/").removesuffix(".py") for f in gpu.flagged())}
    code = STRANGERS.format(path=path, allowed=THERE | WHEELS | own, work=work)
    env = dict(os.environ, OMP_NUM_THREADS="1", AASP_SBLU_BACKEND="torch")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=gpu.ROOT, env=env)


@pytest.mark.skipif(torch.cuda.is_available(), reason="SKIPPED: there is a GPU")
def test_without_a_gpu_nothing_runs_and_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == gpu.NO_GPU
    assert "no GPU: not run" in capsys.readouterr().out and not (tmp_path / "gpu.json").exists()


def test_parts_are_recorded_skipped_and_stopped(tmp_path, monkeypatch, capsys):
    parts = {"good": ("a", ["-c", "print('{out}')"]), "bad": ("b", ["-c", "raise SystemExit(7)"]),
             "slow": ("c", ["-c", "import time; time.sleep(600)"])}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "gpu_name", lambda: "a GPU")
    def run(*words, limit="120"):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--out", str(tmp_path), "--limit", limit])
        return gpu.main(), capsys.readouterr().out
    code, text = run("good", "bad")
    assert code == 1 and str(tmp_path) in text
    assert run("slow", limit="1")[0] == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [found[p]["result"] for p in parts] == ["passed", "failed, exit status 7", "stopped after 1 s"]
    assert found["good"]["gpu"] == "a GPU" and found["good"]["revision"] == gpu.revision() and found["good"]["tail"] == str(tmp_path)
    code, text = run("good", "bad")  # what passed is skipped, what failed runs again
    assert code == 1 and "good: recorded" in text and "bad: recorded" not in text
    assert run("good", "--force")[1].count("passed") == 1
    monkeypatch.setattr(gpu, "revision", lambda: "later")
    assert "skipped" not in run("good")[1]
    assert "bad" in run("--list")[1]
    monkeypatch.setattr(gpu, "revision", lambda: "later")
    kept = tmp_path / "earlier.json"
    kept.write_text((tmp_path / "gpu.json").read_text())
    (tmp_path / "gpu.json").unlink()  # a lent machine empties its folder
    code, text = run("good", "bad", "--known", str(kept), "--budget", "10")
    assert code == 1 and "good: recorded" in text and "bad: not started" in text
    assert list(json.loads((tmp_path / "gpu.json").read_text())) == ["good"]
    with pytest.raises(SystemExit): run("nonsense")


def test_parts_name_what_exists():
    words = [w for _, command in gpu.PARTS.values() for w in command]
    assert all((gpu.ROOT / w).exists() for w in words if w.endswith((".py", ".ipynb"))) and gpu.flagged()
    assert all((gpu.ROOT / f).exists() for f in gpu.flagged())
    pins = dict(line.split("==") for line in (gpu.ROOT / "tests/gpu_wheels.txt").read_text().splitlines() if "==" in line)
    known = dict(line.split("==") for line in (gpu.ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins and all(known[name] == version for name, version in pins.items())


def test_notebook_parameters(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")  # what `execute` sets would reach the kernels of other tests
    assert gpu.parameter("a=3") == ("a", 3) and gpu.parameter("b=cuda") == ("b", "cuda") and gpu.parameter("c=1=2") == ("c", "1=2")
    assert gpu.parameter("kernel_sizes=31,63") == ("kernel_sizes", "31,63")
    with pytest.raises(SystemExit, match="no parameter nonsense"): gpu.execute("nbs/runs/bench_sblu.ipynb", dict(nonsense=1))


@pytest.mark.slow
def test_benchmarks_and_tests_need_nothing_more(tmp_path):
    sblu = dict(batch=1, channels=8, frames=64, kernel_sizes="31", threads=1, rounds=1, compile_reference=False, out_dir=str(tmp_path))
    train = dict(preset="tiny", batch=2, views=2, threads=1, rounds=1, profile=False, out_dir=str(tmp_path))
    imports = "; ".join(f"import {f.removeprefix('tests/').removesuffix('.py')}" for f in gpu.flagged())
    done = alone(f"gpu.execute('nbs/runs/bench_sblu.ipynb', {sblu!r}); gpu.execute('nbs/runs/bench_training.ipynb', {train!r}); {imports}")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert (tmp_path / "bench_sblu_cpu.csv").exists() and (tmp_path / "bench_training_cpu.csv").exists()
