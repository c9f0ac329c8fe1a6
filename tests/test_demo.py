"""The demo: sized by the machine, and ended by one signal with a checkpoint in both of its trainings."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from aasp_nb.cli import STOPPED
from aasp_nb.runs import latest_checkpoint, read_metrics

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "runs" / "demo.ipynb"
SMALL = dict(per_class=2, batch_size=2, views=2, probe_steps=2, seeds="0", steps=3000)


def start(home):
    "The demo in processes of its own, as `make demo` starts it."
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | dict(AASP_HOME=str(home), PYTHONUNBUFFERED="1")
    parts = [str(x) for n, v in SMALL.items() for x in ("-p", n, v)]
    with (home / "log.txt").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "aasp_nb.cli", "run", str(NOTEBOOK), str(home / "out.ipynb"), *parts,
                                 "-r", "out", str(home / "demo")], env=env, stdout=log, stderr=log, start_new_session=True)


def steps(home):
    "Steps that each training has logged so far."
    return {f.name.split("-")[1]: max(read_metrics(f).get("step", [0]), default=0) for f in (home / "demo").glob("pretrain-*")}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_both_trainings_with_a_checkpoint(number, tmp_path):
    process = start(tmp_path)
    family = []
    try:
        while not (len(done := steps(tmp_path)) == 2 and min(done.values()) >= 10):
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, number)  # as a terminal does: everything in the launcher's group
        assert process.wait(300) == STOPPED
    finally:
        if process.poll() is None: process.kill()
    said = (tmp_path / "log.txt").read_text()
    assert f"stopped by {number.name}" in said and "minutes on this machine" in said
    for folder in (tmp_path / "demo").glob("pretrain-*"):
        assert latest_checkpoint(folder / "checkpoints")[2]["step"] >= 10, folder
    assert not psutil.wait_procs(family, 60)[1]
    assert not (tmp_path / "demo" / "summary.txt").exists()  # nothing went on behind the signal
