"""`make test`: every part in turn, then one table with its time, and the totals. `--full` adds the long tests."""
import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def digest(folder: str, pattern: str) -> dict:
    "Content hash of every file below `folder` that matches `pattern`."
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((ROOT / folder).rglob(pattern))
            if ".ipynb_checkpoints" not in p.parts}


def run(*command: str) -> tuple[int, str]:
    "Run a command in the repository root, echo its output as it comes, and return its code and output."
    proc = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"})
    lines = []
    for line in proc.stdout:
        sys.stdout.write(line); sys.stdout.flush()
        lines.append(line)
    return proc.wait(), "".join(lines)


def unchanged(name: str, tool: str, folder: str, pattern: str) -> tuple[int, int, int]:
    "Run an nbdev tool that should leave `folder` as it is; name what it changed."
    before = digest(folder, pattern)
    code, _ = run(str(BIN / tool))
    after = digest(folder, pattern)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    for path in changed: print(f"{tool} changed {path}: commit what it makes")
    ok = code == 0 and not changed
    return int(ok), int(not ok), 0


def notebooks() -> tuple[int, int, int]:
    "nbdev_test over the library notebooks; a failing notebook is counted once."
    flags = os.environ.get("AASP_TEST_FLAGS", "")
    command = [str(BIN / "nbdev_test"), "--n_workers", "2", "--do_print", "--timing"]
    if flags: command += ["--flags", flags]
    code, text = run(*command)
    names = set(re.findall(r"Starting .*?([\w]+\.ipynb)", text))
    failed = set(re.findall(r"^\s+([\w]+\.ipynb)\s*$", text.partition("Failed On The Following")[2], re.M))
    if code and not failed: failed = {"unknown"}
    return len(names - failed), len(failed), 0


def checked(tool: str, *args: str) -> tuple[int, int, int]:
    "Run a linter or type checker over the exported code and the tests; what it finds is mended in the notebooks."
    code, _ = run(str(BIN / tool), *args)
    return int(code == 0), int(code != 0), 0


def pytests(full: bool) -> tuple[int, int, int]:
    "pytest over tests/; the counts are read from its last line."
    code, text = run(sys.executable, "-m", "pytest", "-q", "-rfEs", "--durations=12", "-n", "2", "--dist", "loadfile", "tests",
                     *(["--full"] if full else []))
    last = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)][-1:]
    count = lambda word: sum(int(n) for n in re.findall(rf"(\d+) {word}", "".join(last)))
    passed, failed, skipped = count("passed"), count("failed") + count("error"), count("skipped")
    return passed, max(failed, int(code not in (0, 5))), skipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the long tests too")
    full = parser.parse_args().full
    if full: os.environ.setdefault("AASP_TEST_FLAGS", "slow data")
    parts = [("nbdev_export leaves no diff", lambda: unchanged("export", "nbdev_export", "aasp_nb", "*.py")),
             ("nbdev_clean leaves no diff", lambda: unchanged("clean", "nbdev_clean", "nbs", "*.ipynb")),
             ("ruff", lambda: checked("ruff", "check", "aasp_nb", "tests")),
             ("mypy (public surface)", lambda: checked("mypy")),
             ("library notebooks (nbdev_test)", notebooks),
             ("pytest", lambda: pytests(full))]
    rows, total = [], [0, 0, 0]
    for name, part in parts:
        print(f"\n== {name}", flush=True)
        start = time.time()
        counts = part()
        rows.append((name, *counts, time.time() - start))
        total = [a + b for a, b in zip(total, counts)]
    print(f"\n{'part':34}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for name, passed, failed, skipped, seconds in rows:
        print(f"{name:34}{passed:>8}{failed:>8}{skipped:>9}{seconds:>9.0f}")
    real = ROOT / "out" / ".real_audio_tests"
    ran = len(real.read_text().splitlines()) if real.exists() else 0
    print(f"{total[0]} passed, {total[1]} failed, {total[2]} skipped")
    print(f"real-audio tests run: {ran}" if ran else
          "NO real-audio test ran: set AASP_DATA to a folder of labelled audio to run them")
    return int(total[1] > 0)


if __name__ == "__main__":
    sys.exit(main())
