"""`make gpu`: what waits for a GPU, part by part, each within 8 minutes.

A part that is recorded for this state of the code on this kind of GPU is skipped. Parts write their tables to `figures/`
(or --out) and one entry each to `gpu.json` there. Nothing but PyTorch and the wheels of `tests/gpu_wheels.txt` is needed:
notebooks are executed by this script, without Jupyter.

    python tests/gpu.py                     # every part that has no record yet
    python tests/gpu.py kernels --force     # one part, again
    python tests/gpu.py --list

Where calls are short (a lent machine), `--budget 560` starts no part that has less than 90 s left and `--known FILE` skips
what an earlier call's gpu.json has as passed; both go on where that call stopped: the same command until nothing is left.

Exit status: 0 all asked for ran or were recorded, 1 a part failed or was not started, 3 no GPU: nothing was run.
"""
import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480  # seconds of a part
LEAST = 90  # seconds that a part is worth starting with
NO_GPU = 3

PARTS = {  # name: (what it is, command); {out} is the folder for tables, {flagged} the files of `flagged`
    "kernels": ("the SBLU kernels against the direct sum, every size and type",
                ["-m", "pytest", "-q", "-rs", "-m", "cuda", "tests/test_sblu_ops.py"]),
    "tests": ("all other tests flagged cuda", ["-m", "pytest", "-q", "-rs", "-m", "cuda", "{flagged}"]),
    "bench": ("adaptive SBLU against its alternatives",
              ["tests/gpu.py", "--execute", "nbs/runs/bench_sblu.ipynb", "device=cuda", "compile_reference=True", "out_dir={out}"]),
    "training": ("what AaPE costs in a pre-training step, preset base",
                 ["tests/gpu.py", "--execute", "nbs/runs/bench_training.ipynb", "device=cuda", "precision=bf16", "out_dir={out}"]),
    "train": ("clips a second of whole steps, preset base, beside timm's blocks alone",
              ["tests/gpu.py", "--execute", "nbs/runs/bench_train.ipynb", "device=cuda", "precision=bf16", "out_dir={out}"]),
}


def flagged() -> list[str]:
    "Test files with tests flagged cuda, the kernels' own left out."
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_*.py"))
            if "@pytest.mark.cuda" in p.read_text() and p.name != "test_sblu_ops.py"]


def gpu_name() -> str | None:
    "The GPU that torch sees, or None."
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def revision() -> str:
    "A hash of everything that decides what a part does: it needs no git."
    files = [p for pattern in ("aasp_nb/*.py", "nbs/**/*.ipynb", "tests/*.py") for p in ROOT.glob(pattern)]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files))).hexdigest()[:12]


def records(out: Path, known: str = "") -> dict:
    "What `gpu.json` says, over what an earlier one elsewhere says; empty where there is none."
    paths = [Path(known)] * bool(known) + [out / "gpu.json"]
    return {part: entry for path in paths if path.exists() for part, entry in json.loads(path.read_text()).items()}


def record(out: Path, part: str, entry: dict):
    "Write a part's entry; the file is replaced in one go."
    new = out / "gpu.json.new"
    new.write_text(json.dumps({**records(out), part: entry}, indent=1) + "\n")
    os.replace(new, out / "gpu.json")


def parameter(text: str) -> tuple:
    "name=value of a notebook parameter; values that are no Python number, truth or quoted text stay strings, so does 31,63."
    name, _, value = text.partition("=")
    try: found = ast.literal_eval(value)
    except (ValueError, SyntaxError): return name, value
    return name, value if isinstance(found, tuple) else found


def execute(notebook: str, given: dict):
    "Run a notebook's code cells in one namespace, `given` set after its parameters; without Jupyter and papermill."
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.path.insert(0, str(ROOT))
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
    if given and not tagged: raise SystemExit(f"{notebook} has no parameters")
    space = {"__name__": "__main__"}
    for i, cell in enumerate(cells):
        if cell["cell_type"] != "code": continue
        exec(compile("".join(cell["source"]), f"{notebook}, cell {i}", "exec"), space)
        if cell in tagged:
            unknown = sorted(set(given) - set(space))
            if unknown: raise SystemExit(f"{notebook} has no parameter {', '.join(unknown)}")
            space.update(given)


def run_part(part: str, out: Path, limit: float) -> tuple[int, float, str]:
    "(exit status, seconds, last lines) of a part, its output echoed as it comes; 124 when it ran past the limit."
    words = [w for word in PARTS[part][1] for w in (flagged() if word == "{flagged}" else [word.format(out=out)])]
    command = [sys.executable, *words]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    start, lines = time.time(), []
    proc = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    late = threading.Timer(limit, proc.kill)
    late.start()
    try:
        for line in proc.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        status = proc.wait()
    finally:
        over = not late.is_alive()
        late.cancel()
    return 124 if over else status, time.time() - start, "\n".join(lines[-60:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="parts to run; all by default")
    parser.add_argument("--out", default=str(ROOT / "figures"), help="folder for tables and gpu.json")
    parser.add_argument("--force", action="store_true", help="run recorded parts again")
    parser.add_argument("--list", action="store_true", help="show the parts and what is recorded")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a part")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all parts together")
    parser.add_argument("--known", default="", help="gpu.json of an earlier call, if it lies elsewhere")
    parser.add_argument("--execute", metavar="NOTEBOOK", help="run one notebook here, with name=value parameters")
    asked = parser.parse_args()
    if asked.execute:
        execute(asked.execute, dict(map(parameter, asked.parts)))
        return 0
    unknown = sorted(set(asked.parts) - set(PARTS))
    if unknown: parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    out, name, state = Path(asked.out).resolve(), gpu_name(), revision()
    out.mkdir(parents=True, exist_ok=True)
    done, start = records(out, asked.known), time.time()
    if asked.list:
        for part, (what, _) in PARTS.items(): print(f"{part:10s} {what}: {done.get(part, {}).get('result', 'not recorded')}")
        return 0
    if name is None:
        print(f"no GPU: not run ({', '.join(asked.parts or PARTS)}); torch finds no CUDA device here")
        return NO_GPU
    failed = []
    for part in asked.parts or PARTS:
        had = done.get(part, {})
        if (had.get("revision"), had.get("gpu"), had.get("result")) == (state, name, "passed") and not asked.force:
            print(f"== {part}: recorded for this revision on {name}, skipped (--force runs it again)")
            if asked.known: record(out, part, had)
            continue
        left = asked.budget - (time.time() - start)
        if left < min(LEAST, asked.limit):
            print(f"== {part}: not started, {left:.0f} s are left; the same command goes on here", flush=True)
            failed.append(part)
            continue
        print(f"== {part}: {PARTS[part][0]}", flush=True)
        limit = min(asked.limit, left)
        status, seconds, tail = run_part(part, out, limit)
        result = {0: "passed", 124: f"stopped after {limit:.0f} s"}.get(status, f"failed, exit status {status}")
        print(f"== {part}: {result}, {seconds:.0f} s", flush=True)
        record(out, part, dict(result=result, seconds=round(seconds), revision=state, gpu=name,
                               when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), tail=tail))
        if status: failed.append(part)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
