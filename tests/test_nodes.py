"""Several machines, played by several launchers on the loopback: the losses of one process, kills, stops, and what does not fit together."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from aasp_nb.nodes import alike, by_first, NodeError, seen_by_all, together
from aasp_nb.processes import rank, start_processes
from aasp_nb.pretraining import pretrain
from aasp_nb.runs import latest_checkpoint, read_metrics, RunError
from aasp_nb.train import asked

STEPS = 24
SERIES = ("loss", "loss_mask", "loss_cls", "loss_con", "grad_norm", "lr", "momentum")


def told(function) -> str:
    "How a call ends."
    try: return f"returned {function()}"
    except Exception as e: return f"{type(e).__name__}: {e}"


def disagree(folders: list) -> list:
    "What one of two processes hears where they differ."
    def odd(): return int("seven") if rank() else 1
    def even(): return 1 if rank() else Path(folders[1]).read_bytes()
    return [told(lambda: alike({"the code": "aaa", "seed": rank()}, "start the same")),
            told(lambda: alike({"the code": "aaa" if rank() else "bbb"})), told(lambda: alike({"the code": "aaa"})),
            told(lambda: together(odd)), told(lambda: together(rank)), told(lambda: by_first(even)), told(lambda: by_first(rank)),
            told(lambda: seen_by_all(folders[rank()], 0)), told(lambda: seen_by_all(folders[0], 30))]


def both(folders: list) -> list:
    from aasp_nb.processes import gathered
    return gathered(disagree(folders))


def test_what_differs_is_named_in_every_process(tmp_path):
    folders = [str(tmp_path / name) for name in ("first", "second")]
    for f in folders: Path(f).mkdir()
    heard = start_processes(both, 2, (folders,))
    host = socket.gethostname()
    for number, lines in enumerate(heard):
        assert lines[0] == f"NodeError: seed differs: 0 on {host} (process 0), 1 on {host} (process 1): start the same"
        assert lines[1] == f"NodeError: the code differs: 'bbb' on {host} (process 0), 'aaa' on {host} (process 1)"
        assert lines[2] == "returned None" and lines[4] == f"returned {number}" and lines[6] == "returned 0"
        assert lines[3] == "ValueError: invalid literal for int() with base 10: 'seven'"
        assert lines[5].startswith("IsADirectoryError")
        assert lines[7].startswith(f"NodeError: {folders[number]} is not one folder for all") and f"not seen on {host}" in lines[7]
        assert lines[8] == "returned None"
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


STARTED = []  # commands of a test


@pytest.fixture(autouse=True)
def none_left():
    "A test that fails leaves no command behind."
    yield
    while STARTED:
        if (left := STARTED.pop()).poll() is not None: continue  # its number may be another's by now
        with contextlib.suppress(psutil.NoSuchProcess):
            for p in psutil.Process(left.pid).children(recursive=True): p.kill()
        left.kill()


class Node:
    "A machine's command, started; its output goes to a file."
    def __init__(self, command, out, **env):
        self.command, self.out, self.env = command, out, env
        self.start()

    def start(self):
        with open(self.out, "a") as f:
            self.process = subprocess.Popen([sys.executable, "-m", *map(str, self.command)], stdout=f, stderr=f, start_new_session=True,
                                            env={**os.environ, "OMP_NUM_THREADS": "1", **self.env})
        STARTED.append(self.process)

    @property
    def members(self) -> list:
        "Its training processes, of which torch's own helpers are none."
        try: children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess: return []
        return [p for p in children if any(word in " ".join(p.cmdline()) for word in ("spawn_main", "aasp_nb.train"))]

    def ended(self) -> tuple:
        code = self.process.wait(600)
        return code, Path(self.out).read_text()


def until(holds, what: str, *nodes):
    "Wait for something, as long as the commands run."
    end = time.monotonic() + 600
    while not holds():
        for n in nodes: assert n.process.poll() is None, f"{what}: a command ended\n{Path(n.out).read_text()}"
        assert time.monotonic() < end, what
        time.sleep(0.02)


def steps(run) -> int: return int(max(read_metrics(run).get("step", [0]), default=0))


def log(run) -> str: return (run / "log.txt").read_text() if (run / "log.txt").is_file() else ""


def given(clips, run, **more) -> dict:
    fields = dict(preset="nano", data=clips, run_dir=run, steps=STEPS, warmup_steps=4, batch_size=4, device="cpu", cache="False", workers=0,
                  norm_measure="False", log_every=1, save_every=4, progress="none")
    return {**fields, **more}


def words(parameters: dict) -> list: return [x for k, v in parameters.items() for x in ("-p", k, v)]


def two_nodes(tmp_path, parameters, *options, others=None, launcher=None) -> list:
    "Two launchers that meet on the loopback."
    where = f"127.0.0.1:{free_port()}"
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", where,
                 "--max-restarts", 5, "-m", "aasp_nb.train"]
    else: start = ["aasp_nb.train", "--nodes", 2, "--endpoint", where, *options]
    return [Node([*start, *words(p)], tmp_path / f"node{i}.txt", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            for i, p in enumerate((parameters, others or parameters))]


@pytest.fixture
def whole(clips, tmp_path):
    "Metrics of one process that is never interrupted."
    old = torch.get_num_threads()
    pretrain(**asked(given(clips, tmp_path / "whole")))
    torch.set_num_threads(old)
    return read_metrics(tmp_path / "whole")


def equal(run, whole):
    got = read_metrics(run)
    assert got["step"].tolist() == whole["step"].tolist() == list(range(1, STEPS + 1))
    for name in SERIES: np.testing.assert_allclose(got[name], whole[name], err_msg=name, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_a_process_and_then_a_machine_are_lost_and_the_losses_are_those_of_one(clips, whole, tmp_path):
    run = tmp_path / "run"
    nodes = two_nodes(tmp_path, given(clips, run, monitor=clips))
    until(lambda: steps(run) >= 5 and nodes[1].members, "training begins", *nodes)
    nodes[1].members[0].kill()
    until(lambda: "resumed from" in log(run) and steps(run) >= 12, "training goes on", *nodes)
    nodes[1].process.kill()  # the launcher: its processes stop by themselves
    nodes[1].process.wait()
    nodes[1].start()
    for n in nodes: assert n.ended()[0] == 0, n.ended()[1]
    assert log(run).count("resumed from") == 2, log(run)
    equal(run, whole)
    out = json.loads((run / "results.json").read_text())
    assert out["status"] == "finished" and out["processes"] == 2


@pytest.mark.slow
def test_under_torchrun_a_process_is_lost(clips, whole, tmp_path):
    run = tmp_path / "run"
    nodes = two_nodes(tmp_path, given(clips, run), launcher="torchrun")
    until(lambda: steps(run) >= 6 and nodes[0].members, "training begins", *nodes)
    nodes[0].members[0].kill()
    for n in nodes: assert n.ended()[0] == 0, n.ended()[1]
    assert "resumed from" in log(run)
    equal(run, whole)


@pytest.mark.slow
def test_a_signal_to_one_machine_stops_all_and_fewer_go_on(clips, whole, tmp_path):
    "The checkpoint of two machines is gone on with by one process: nothing is lost, the line says so."
    run = tmp_path / "run"
    nodes = two_nodes(tmp_path, given(clips, run))
    until(lambda: steps(run) >= 5, "training begins", *nodes)
    nodes[1].process.send_signal(signal.SIGUSR1)
    for n in nodes:
        code, text = n.ended()
        assert code == 75 and (n is nodes[1] or "the same command goes on" in text), text
    at = latest_checkpoint(run / "checkpoints")[2]
    assert at["processes"] == 2 and at["step"] == steps(run) < STEPS
    pretrain(**asked(given(clips, run)))
    assert f"resumed from step-{at['step']:08d}, which 2 processes wrote; 1 now" in log(run)
    equal(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("change, says", [
    (dict(lr="2e-3"), r"lr differs: 0.00[12] on .* \(process 0\), 0.00[12] on .*: start the same command"),
    (dict(data="other"), "number of clips differs: .*give every machine the same data"),
    (dict(data="no/such/folder"), "no/such/folder")], ids=str)
def test_machines_that_do_not_fit_together_end_before_the_first_step(change, says, clips, labelled_clips, tmp_path):
    import re
    if change.get("data") == "other": change = dict(data=labelled_clips)
    run = tmp_path / "run"
    for n in two_nodes(tmp_path, given(clips, run), others=given(clips, run) | change):
        code, text = n.ended()
        assert code == 1 and re.search(says, text), text
    assert not run.exists()


@pytest.mark.slow
def test_a_machine_that_nobody_joins_gives_up(clips, tmp_path):
    where = f"127.0.0.1:{free_port()}"
    node = Node(["aasp_nb.train", "--nodes", 2, "--endpoint", where, "--minutes", 0.05, *words(given(clips, tmp_path / "run"))], tmp_path / "a")
    code, text = node.ended()
    assert code == 1 and f"not all of 2 machines came to {where} within 0.05 minutes" in text, text
    assert not (tmp_path / "run").exists()


def free_job() -> int:
    "A job number whose port is free."
    for job in range(os.getpid() % 10000, 20000):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", 20000 + job % 10000))
            return job


SRUN = """import os, signal, subprocess, sys
n = int(next(a for a in sys.argv if a.startswith("--nodes=")).split("=")[1])
command = sys.argv[next(i for i, a in enumerate(sys.argv[1:], 1) if not a.startswith("--")):]
tasks = [subprocess.Popen(command) for _ in range(n)]
for s in (signal.SIGUSR1, signal.SIGTERM): signal.signal(s, lambda number, frame: [t.send_signal(number) for t in tasks])
open(os.environ["STARTED"], "a").write("x")
sys.exit(max(t.wait() for t in tasks))
"""


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_queues_itself_again_and_ends_with_the_notebook(clips, tmp_path):
    "srun and scontrol are stubs: the first starts the command twice here and passes signals on, as srun does."
    from aasp_nb.cli import slurm_script
    stubs, run = tmp_path / "bin", tmp_path / "run"
    stubs.mkdir()
    (stubs / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
    (stubs / "scontrol").write_text(f'#!/bin/sh\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/queue\n')
    for f in stubs.iterdir(): f.chmod(0o755)
    given_ = {k: v for k, v in given(clips, run, steps=400, save_every=1000).items()}
    (tmp_path / "job.sh").write_text(slurm_script("pretrain", f"{tmp_path}/out.ipynb", given_, nodes=2))
    env = dict(PATH=f"{stubs}:{os.environ['PATH']}", SLURM_JOB_ID=str(free_job()), SLURM_JOB_NODELIST="here",
               STARTED=str(tmp_path / "started"), AASP_HOME=str(tmp_path))

    def job(**more):
        p = subprocess.Popen(["bash", tmp_path / "job.sh"], env={**os.environ, "OMP_NUM_THREADS": "1", **env, **more}, start_new_session=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        STARTED.append(p)
        return p
    first = job()
    end = time.monotonic() + 600
    while steps(run) < 5 and first.poll() is None and time.monotonic() < end: time.sleep(0.02)
    os.kill(first.pid, signal.SIGUSR1)  # the batch shell alone
    text = first.communicate(timeout=600)[0]
    assert first.returncode == 0 and (tmp_path / "queue").read_text().startswith("requeue "), text
    assert json.loads((run / "results.json").read_text())["reason"] == "SIGUSR1" and not (tmp_path / "out.ipynb").exists()
    second = job(SLURM_RESTART_COUNT="1")
    text = second.communicate(timeout=600)[0]
    assert second.returncode == 0, text
    out = json.loads((run / "results.json").read_text())
    assert out["status"] == "finished" and out["processes"] == 2 and "nothing to do: 400 steps are done" in text
    assert "finished at step 400" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.slow
def test_by_ssh_a_signal_stops_all_with_a_checkpoint(clips, tmp_path):
    "ssh is a stub that runs the command here: what is tested is the script's own."
    stubs, run = tmp_path / "bin", tmp_path / "run"
    stubs.mkdir()
    (stubs / "ssh").write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    (stubs / "ssh").chmod(0o755)
    env = dict(PATH=f"{stubs}:{os.environ['PATH']}", HOSTS="127.0.0.1 localhost", PORT=str(free_port()), PYTHON=sys.executable,
               OMP_NUM_THREADS="1")
    script = Path(__file__).resolve().parent.parent / "deploy" / "ssh.sh"
    job = subprocess.Popen(["bash", script, *map(str, words(given(clips, run, steps=400, save_every=1000)))], env={**os.environ, **env},
                           start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    STARTED.append(job)
    end = time.monotonic() + 600
    while steps(run) < 5 and job.poll() is None and time.monotonic() < end: time.sleep(0.02)
    os.kill(job.pid, signal.SIGTERM)
    text = job.communicate(timeout=600)[0]
    assert job.returncode == 75, text
    assert latest_checkpoint(run / "checkpoints")[2]["processes"] == 2 and "stopped at step" in text


def test_what_no_machine_can_do_is_refused_at_once(clips, tmp_path, monkeypatch):
    from aasp_nb.nodes import Meeting
    call = asked(given(clips, tmp_path / "run", processes=8))
    with pytest.raises(RunError, match="batch_size 4 is not a multiple"): pretrain(**call, meeting=Meeting("2", "127.0.0.1:1"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(RunError, match="leave processes and meeting out"): pretrain(**call)
    with pytest.raises(NodeError, match="number of machines"): Meeting("none", "127.0.0.1:1")
