"""Runs that survive: real kills, signals through the launcher, full disks and vanished folders, guards that do not wait."""
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch

from aasp_nb import files, loop, pretraining, runs
from aasp_nb.cli import FINISHED, KERNEL_DIED, STOPPED, USAGE, slurm_script
from aasp_nb.config import AaSPConfig
from aasp_nb.loop import fit
from aasp_nb.pretraining import pretrain
from aasp_nb.runs import (RunDir, RunError, latest_checkpoint, load_checkpoint, read_metrics,
                          save_checkpoint, step_folders)

FIELDS = dict(warmup_steps=4)
STEPS = 260
CALL = dict(device="cpu", cache=False, workers=0, log_every=1, progress="none")
SERIES = ("loss", "loss_mask", "loss_cls", "loss_con", "grad_norm", "lr", "momentum")


def config(**kw): return AaSPConfig.preset("nano", **{**FIELDS, "steps": 6, **kw})


def calm(**kw): return config(**{"norm_measure": False, **kw})


def uninterrupted(clips, run, steps):
    "Metrics of a run that nothing stops, on one thread as in the real processes."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: pretrain(config(steps=steps), clips, run, **CALL)
    finally: torch.set_num_threads(threads)
    return read_metrics(run)


@pytest.fixture(scope="session")
def whole(clips, tmp_path_factory):
    "Metrics of the uninterrupted run."
    return uninterrupted(clips, tmp_path_factory.mktemp("whole") / "run", STEPS)


def equal(run, whole):
    "Has a run the rows of the uninterrupted one?"
    got = read_metrics(run)
    assert got["step"].tolist() == whole["step"].tolist()
    for name in SERIES: np.testing.assert_array_equal(got[name], whole[name], err_msg=name)


# --- real processes ------------------------------------------------------------------------------------------------

class Launched:
    "A run of the pre-training notebook in real processes; `command` is what precedes the notebook."
    def __init__(self, clips, home, *command, before=(), out=None, **more):
        self.run, self.home = home / "runs" / "r", home
        fields = dict(preset="nano", data=clips, run_dir="r", device="cpu", workers=1, cache="False", log_every=1, save_every=20,
                      threads=1) | FIELDS | dict(steps=STEPS) | more
        parts = [str(x) for n, v in fields.items() for x in ("-p", n, v)]
        command = command or (sys.executable, "-m", "aasp_nb.cli", "run")
        notebook = Path(__file__).parent.parent / "nbs" / "runs" / "pretrain.ipynb"
        self.out = out or home / "out.ipynb"
        self.log = (home / "log.txt").open("ab")
        self.process = subprocess.Popen([*before, *command, str(notebook), str(self.out), *parts], env=environment(home),
                                        stdout=self.log, stderr=self.log, start_new_session=True)

    def tree(self):
        "Kernel, and its loader workers or training processes, as far as they run."
        try: family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess: return None, []
        kernels = [p for p in family if any("ipykernel" in part for part in cmdline(p))]
        kernel = next((k for k in kernels if k.ppid() not in {p.pid for p in kernels}), None)
        members = [p for p in family if "spawn_main" in " ".join(cmdline(p))]
        return kernel, [p for p in kernels if kernel and p.pid != kernel.pid] + sorted(members, key=lambda p: p.pid)

    def until(self, step, timeout=300):
        "Wait until the run has logged `step`, with a worker alive."
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None: raise AssertionError(f"ended with {self.process.returncode}: {self.said()[-2000:]}")
            kernel, workers = self.tree()
            if last(self.run) >= step and workers: return kernel, workers
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached: {self.said()[-2000:]}")

    def ended(self, timeout=300): return self.process.wait(timeout)

    def said(self):
        self.log.flush()
        return (self.home / "log.txt").read_text()


def environment(home):
    "For real processes; a kernel that thinks it is tested by pytest would not show what its children print."
    own = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return {**own, "AASP_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def cmdline(process):
    try: return process.cmdline()
    except psutil.Error: return []


def last(run):
    "The last whole step in a run's metrics."
    try: lines = (run / "metrics.csv").read_text().splitlines()
    except OSError: return -1
    return int(lines[-1].split(",")[0]) if len(lines) > 1 and lines[-1].split(",")[0].isdigit() else -1


def gone(processes, within=15):
    "Have all of these processes ended?"
    _, alive = psutil.wait_procs([p for p in processes if p], timeout=within)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def text(path):
    return "\n".join(o.get("text", "") for c in nbformat.read(path, 4).cells for o in c.get("outputs", []))


@pytest.fixture
def home(tmp_path):
    "A home for runs; whatever a failed test leaves running is ended."
    yield tmp_path
    for p in psutil.process_iter(["pid"]):
        try:
            if p.environ().get("AASP_HOME") == str(tmp_path): p.kill()
        except psutil.Error: pass


def test_kill_9_of_worker_kernel_and_launcher_then_the_losses_of_an_uninterrupted_run(clips, whole, home):
    rng = random.Random(1)
    a = Launched(clips, home, sys.executable, "-m", "aasp_nb.cli", "run", "--retries", "1")
    kernel, workers = a.until(rng.randint(15, 40))
    time.sleep(rng.random() * 0.2)
    workers[0].kill()  # the loader starts a new one and no step is lost
    kernel, workers = a.until(rng.randint(90, 130))
    kernel.kill()  # the launcher starts a new kernel
    assert gone(workers)
    reached = last(a.run)
    time.sleep(1)
    kernel, workers = a.until(reached + rng.randint(10, 40))
    a.process.kill()
    assert gone([kernel, *workers])  # the kernel notices, its workers follow
    a.ended()
    b = Launched(clips, home)
    assert b.ended() == FINISHED, b.said()[-2000:]
    equal(b.run, whole)
    said = b.said()
    assert "loader worker" in said and "the kernel was killed" in said and "resumed from step-" in said


def test_signals_leave_a_checkpoint_and_a_distinct_exit_code(clips, whole, home, tmp_path):
    # under nohup: SIGHUP is ignored, SIGTERM stops with a checkpoint
    a = Launched(clips, home, before=("nohup",))
    kernel, workers = a.until(10)
    os.kill(a.process.pid, signal.SIGHUP)
    time.sleep(0.3)
    assert a.process.poll() is None
    a.process.terminate()
    assert a.ended() == STOPPED and gone([kernel, *workers], 3)
    done = latest_checkpoint(a.run / "checkpoints")[2]["step"]
    assert last(a.run) == done and f"stopped at step {done} of {STEPS} (SIGTERM)" in text(a.out)
    # a signal to the process group, as Slurm sends it
    b = Launched(clips, home)
    kernel, workers = b.until(done + 10)
    os.killpg(b.process.pid, signal.SIGUSR1)
    assert b.ended() == STOPPED and gone([kernel, *workers], 3)
    assert latest_checkpoint(b.run / "checkpoints")[2]["step"] == last(b.run) > done and "(SIGUSR1)" in text(b.out)
    # plain papermill passes nothing on: the run ends where it stands, and goes on from its last checkpoint
    c = Launched(clips, home, sys.executable, "-m", "papermill", "--no-progress-bar")
    kernel, workers = c.until(last(b.run) + 30)
    c.process.terminate()
    c.ended()
    assert gone([kernel, *workers])
    d = Launched(clips, home)
    assert d.ended() == FINISHED, d.said()[-2000:]
    equal(d.run, whole)


def test_slurm_script_stops_before_the_time_limit_and_queues_itself_again(clips, home):
    (home / "bin").mkdir()
    fake = home / "bin" / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {home}/queue\n')
    fake.chmod(0o755)
    fields = dict(preset="nano", data=clips, run_dir="r{task}", device="cpu", workers=0, cache=False, log_every=1, steps=300, threads=1,
                  seed="{task}", **FIELDS)
    (home / "job.sh").write_text(slurm_script("pretrain", f"{home}/out-{{task}}.ipynb", fields, "0-3"))
    env = environment(home) | dict(SLURM_JOB_ID="77", SLURM_ARRAY_TASK_ID="3", PATH=f"{home}/bin:{os.environ['PATH']}")
    job = subprocess.Popen(["bash", home / "job.sh"], env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while last(home / "runs" / "r3") < 5 and time.monotonic() < end: time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)  # B: the batch shell alone
    assert job.wait(200) == 0 and (home / "queue").read_text() == "requeue 77\n"
    results = json.loads((home / "runs" / "r3" / "results.json").read_text())
    assert results["status"] == "stopped" and results["reason"] == "SIGUSR1" and results["seed"] == 3
    assert "stopped at step" in text(home / "out-3.ipynb")


@pytest.mark.slow  # tests/test_processes.py kills one of two without the notebook
def test_kill_9_of_one_of_several_workers_and_a_signal(clips, home):
    a = Launched(clips, home, processes=2, workers=0, batch_size=4, steps=4000)
    kernel, members = a.until(25)
    assert len(members) == 2
    random.Random(3).choice(members).kill()
    assert gone(members, 60)  # the other one cannot go on alone
    reached, told = last(a.run), time.monotonic() + 300
    while "resumed from step-" not in (a.run / "log.txt").read_text() and time.monotonic() < told: time.sleep(0.1)
    again, members = a.until(reached + 5)
    assert again.pid == kernel.pid and len(members) == 2
    a.process.terminate()
    assert a.ended() == STOPPED and gone([kernel, *members], 3)
    assert latest_checkpoint(a.run / "checkpoints")[2]["step"] == last(a.run) < 4000
    shown = text(a.out)
    assert "of 2 was lost" in shown and "resumed from step-" in shown and "(SIGTERM)" in shown  # what the processes print is there


@pytest.mark.slow
def test_kills_at_random_moments_with_several_processes(clips, home, tmp_path):
    rng, kills, steps = random.Random(int(os.environ.get("AASP_KILL_SEED", "0"))), [], 150
    several = dict(processes=2, workers=0, batch_size=4, steps=steps, save_every=10)
    pretrain(config(steps=steps, batch_size=4), clips, tmp_path / "whole", processes=2, **CALL)
    while len(kills) < 8:
        a = Launched(clips, home, **several)
        kernel, members = a.until(min(max(0, last(a.run)) + rng.randint(1, 15), steps - 20))
        time.sleep(rng.random() * 0.3)
        kills.append(rng.choice(["member", "member", "kernel", "launcher"]))
        victim = dict(member=rng.choice(members), kernel=kernel, launcher=psutil.Process(a.process.pid))[kills[-1]]
        victim.kill()
        if kills[-1] == "member":  # all start again by themselves; the next kill ends the session
            assert gone(members, 60)
            kernel, members = a.until(last(a.run) + 3)
            kills.append("launcher")
            a.process.kill()
        if kills[-1] == "kernel": assert a.ended() == KERNEL_DIED
        a.ended()
        assert gone([kernel, *members], 60)
    end = Launched(clips, home, **several)
    assert end.ended(600) == FINISHED, end.said()[-3000:]
    equal(end.run, read_metrics(tmp_path / "whole"))


@pytest.mark.slow
def test_twenty_kills_at_random_moments(clips, home, tmp_path):
    rng, kills, steps = random.Random(int(os.environ.get("AASP_KILL_SEED", "0"))), [], 900
    whole = uninterrupted(clips, tmp_path / "whole", steps)
    while len(kills) < 20:
        command = (sys.executable, "-m", "papermill", "--no-progress-bar") if rng.random() < 0.25 else ()
        a, mode, early = Launched(clips, home, *command, steps=steps), rng.choice(["worker", "kernel", "launcher"]), rng.random() < 0.3
        try: kernel, workers = a.until(max(0, last(a.run)) + rng.randint(1, 15), 12 * rng.random() if early else 300)
        except AssertionError:
            assert early, a.said()[-2000:]
            kernel, workers = a.tree()  # perhaps before training
        time.sleep(rng.random() * 0.3)
        assert a.process.poll() is None, a.said()[-2000:]
        victim = dict(worker=workers[0] if workers else kernel, kernel=kernel).get(mode) or psutil.Process(a.process.pid)
        try: victim.kill()
        except psutil.NoSuchProcess: continue
        kills.append(mode)
        if mode == "worker" and workers:  # the run goes on by itself: end it with the next kill
            a.until(last(a.run) + 8)
            a.process.kill()
            kills.append("launcher")
        if victim.pid == getattr(kernel, "pid", None): assert a.ended() in (KERNEL_DIED, 1, 138)  # the last is papermill's own
        else: a.process.kill(); a.ended()
        assert gone([kernel, *workers])
    end = Launched(clips, home, steps=steps)
    assert end.ended(400) == FINISHED, end.said()[-3000:]
    equal(end.run, whole)


CELL = """
from aasp_nb.config import AaSPConfig
from aasp_nb.pretraining import pretrain
config = AaSPConfig.preset("nano", **{fields})
out = pretrain(config, {data!r}, {run!r}, device="cpu", cache=False, workers=1, log_every=1, progress="none")
print(out["status"], out["reason"])
"""


def test_interrupting_a_cell_leaves_a_checkpoint_and_ends_the_workers(clips, tmp_path):
    from jupyter_client.manager import start_new_kernel
    km, kc = start_new_kernel(env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        run, said = tmp_path / "run", []
        kc.execute(CELL.format(fields={**FIELDS, "steps": 5000}, data=str(clips), run=str(run)))
        while last(run) < 5: time.sleep(0.05)
        workers = psutil.Process(km.provisioner.pid).children()
        assert workers
        km.interrupt_kernel()  # what the stop button does: SIGINT to the kernel and its workers
        while (message := kc.get_iopub_msg(timeout=30))["msg_type"] != "status" or message["content"]["execution_state"] != "idle":
            if message["msg_type"] in ("stream", "error"): said.append(str(message["content"]))
        assert "stopped SIGINT" in "".join(said), said
        assert gone(workers, 8)
        assert latest_checkpoint(run / "checkpoints")[2]["step"] == last(run) < 5000
    finally:
        kc.stop_channels()
        km.shutdown_kernel(now=True)


# --- the launcher itself --------------------------------------------------------------------------------------------

def test_launcher_starts_nothing_for_a_wrong_command(tmp_path, capfd):
    from aasp_nb.cli import main
    for command, message in ((["pretrain", "o.ipynb", "-p", "stepz", "3"], "did you mean 'steps'"), (["pretrian", "o.ipynb"], "no notebook"),
                             (["pretrain", "/proc/nowhere/o.ipynb"], "cannot write"), (["pretrain", "o.ipynb", "-f", "none.json"], "none.json")):
        assert main(["run", *command]) == USAGE and message in capfd.readouterr().err


def test_a_killed_loader_worker_is_replaced_and_no_batch_changes(clips):
    from aasp_nb.data import AudioDataset, train_loader
    load = lambda workers: train_loader(AudioDataset(clips, 0.2), 4, seed=1, stop=14, workers=workers)
    want, got = [b["wave"] for b in load(0)], []
    with pytest.warns(UserWarning, match="loader worker was killed") as w:
        for k, b in enumerate(load(2)):
            got.append(b["wave"])
            if k == 2: multiprocessing.active_children()[0].kill()
    assert len([x for x in w if "loader worker" in str(x.message)]) == 1
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))


# --- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def trained(clips, tmp_path_factory):
    "A finished small run with three checkpoints; copy before changing it."
    run = tmp_path_factory.mktemp("trained") / "run"
    pretrain(calm(), clips, run, save_every=2, **CALL)
    return run


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_checkpoint_holds_student_teacher_optimizer_position_and_generators(trained):
    tensors, state = load_checkpoint(step_folders(trained / "checkpoints")[-1])
    names = set(tensors["model"])
    assert {n.split(".")[0] for n in names} == {"student", "teacher", "predictor", "contrastive_head"}
    assert {k.split("/")[0] for k in tensors["optimizer"]} == {"exp_avg", "exp_avg_sq", "step"}
    assert tensors["rng"]["cpu"].dtype == torch.uint8 and state["step"] == 6 and state["config"]["steps"] == 6


def test_kill_while_a_checkpoint_is_written_leaves_the_one_before(copy, clips):
    "What a kill in the middle of a write leaves: a hidden folder, never a checkpoint."
    saved = step_folders(copy / "checkpoints")
    half = copy / "checkpoints" / f".{saved[-1].name}.123"
    saved[-1].rename(half)
    (half / "state.json").unlink()
    path, _, state = latest_checkpoint(copy / "checkpoints")
    assert path == saved[-2] and state["step"] == 4
    before = read_metrics(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(calm(), clips, copy, resume=True, **CALL)
    assert all(np.array_equal(read_metrics(copy)[k], before[k]) for k in SERIES)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "file gone", "state gone"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, clips, damage):
    newest = step_folders(copy / "checkpoints")[-1]
    file = newest / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip": data[len(data) // 2] ^= 4; file.write_bytes(data)
    if damage == "cut": file.write_bytes(data[:-100])
    if damage == "empty": file.write_bytes(b"")
    if damage == "file gone": file.unlink()
    if damage == "state gone": (newest / "state.json").unlink()
    before = read_metrics(copy)
    with pytest.warns(UserWarning, match=f"{newest.name}.*using the one before it"): pretrain(calm(), clips, copy, resume=True, **CALL)
    assert all(np.array_equal(read_metrics(copy)[k], before[k]) for k in SERIES)


def test_writing_a_checkpoint_blocks_training_for_a_copy_only(tmp_path, monkeypatch):
    run, slow = RunDir(tmp_path / "run"), save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda *a: (time.sleep(0.5), slow(*a)))
    saver, x = runs.Saver(run), torch.zeros(10)
    begin = time.monotonic()
    saver.save(1, dict(model=dict(x=x)), {})
    assert time.monotonic() - begin < 0.25
    x += 1  # training goes on
    saver.wait()
    assert load_checkpoint(step_folders(run.checkpoints)[0])[0]["model"]["x"].sum() == 0
    run.close()


# --- disks and folders -----------------------------------------------------------------------------------------------

@pytest.fixture
def mount(tmp_path):
    "A function that mounts a small file system; skipped where this is not allowed."
    mounted = []

    def mounter(size, options=""):
        place = tmp_path / "disk"
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", place], capture_output=True)
        if done.returncode: pytest.skip("SKIPPED: no right to mount a file system")
        mounted.append(place)
        return place

    yield mounter
    for place in mounted: subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_too_small_is_refused_at_the_start(clips, mount):
    place = mount("500k")
    with pytest.raises(RunError, match="free"): pretrain(calm(steps=50), clips, place / "run", **CALL)


def test_a_disk_that_fills_up_ends_the_run_soon_and_the_run_goes_on_later(clips, mount, tmp_path):
    place = mount("40m")
    filler, calls = place / "filler", []
    real = loop.Learner.step

    def step(self, batch, s):
        if s == 6: filler.write_bytes(b"x" * (shutil.disk_usage(place).free - 65536))
        calls.append(s)
        return real(self, batch, s)

    with pytest.MonkeyPatch.context() as m, pytest.raises(RunError, match="[Nn]o space left.*resume"):
        m.setattr(loop.Learner, "step", step)
        pretrain(calm(steps=100), clips, place / "run", save_every=4, **CALL)
    assert len(calls) < 20  # not at the next checkpoint but one, and not at the end
    assert latest_checkpoint(place / "run" / "checkpoints")[2]["step"] >= 4
    filler.unlink()
    out = pretrain(calm(steps=100), clips, place / "run", resume="auto", max_steps=12, **CALL)
    assert out["step"] == 12


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_errors_of_the_disk_are_said_clearly(clips, tmp_path, monkeypatch, code):
    def broken(*a): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(runs, "save_checkpoint", broken)
    with pytest.raises(RunError, match=f"cannot write.*{os.strerror(code)}.*resume"):
        pretrain(calm(steps=40), clips, tmp_path / "run", save_every=2, **CALL)
    assert last(tmp_path / "run") < 10


def test_read_only_run_folder(clips, mount):
    place = mount("8m")
    pretrain(calm(), clips, place / "run", max_steps=2, **CALL)
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    with pytest.raises(RunError, match="cannot write"): pretrain(calm(), clips, place / "run", resume=True, **CALL)
    with pytest.raises(RunError, match="cannot write"): pretrain(calm(), clips, place / "other", **CALL)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("how", ["removed", "moved"])
def test_vanished_run_folder_is_found_at_once(clips, tmp_path, how):
    run, real, calls = tmp_path / "run", loop.Learner.step, []

    def step(self, batch, s):
        if s == 3: shutil.rmtree(run) if how == "removed" else run.rename(tmp_path / "elsewhere")
        calls.append(s)
        return real(self, batch, s)

    with pytest.MonkeyPatch.context() as m, pytest.raises(RunError, match="gone|vanished"):
        m.setattr(loop.Learner, "step", step)
        pretrain(calm(steps=60), clips, run, save_every=5, **CALL)
    assert len(calls) < 8 and not run.exists()


def test_second_run_in_the_same_folder(clips, trained, tmp_path):
    first = RunDir(tmp_path / "run")
    files.write_json(first.path / "config.json", {})
    with pytest.raises(RunError, match="another process"): RunDir(tmp_path / "run", resume="auto")
    first.close()
    RunDir(tmp_path / "run", resume=True).close()
    with pytest.raises(RunError, match='resume="auto"'): pretrain(calm(), clips, trained, **CALL)


def test_a_fork_does_not_keep_the_run_locked(tmp_path):
    "Loader workers outlive a killed kernel by seconds; the next run must not wait for them."
    first = RunDir(tmp_path / "run")
    there, here = os.pipe()
    pid = os.fork()
    if not pid: os.write(here, b"x"); time.sleep(20); os._exit(0)
    os.read(there, 1)
    first.close()
    try: RunDir(tmp_path / "run", resume="auto").close()
    finally: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)


# --- guards -----------------------------------------------------------------------------------------------------------

def test_no_step_waits_for_the_device(clips, tmp_path):
    "Values are read from the device every `log_every` steps only: counted where every `item`, `bool` and `float` ends."
    import traceback
    from torch.utils._python_dispatch import TorchDispatchMode
    reads, package = [], str(Path(pretraining.__file__).parent)  # not by name: a checkout with its .venv has it too

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(func) or "aten.nonzero" in str(func):
                lines = [f.line for f in traceback.extract_stack()[:-1] if f.filename.startswith(package)]
                on_cpu_only = 'device.type == "cpu"' in lines[-1] or "one_hot" in lines[-1]  # checks that a GPU is spared
                if not on_cpu_only: reads.append(lines[-1])
            return func(*args, **(kwargs or {}))

    learner, window = pretraining.build_learner(calm(batch_size=4)), loop.Window()
    batch = dict(wave=torch.randn(4, 16000) * 0.1, valid_samples=torch.full((4,), 12000), index=torch.arange(4))
    ready = learner.prepare(batch, 0)  # masks and padding are made on the CPU, ahead of the device
    learner.prepare = lambda *a: dict(ready)
    with Count():
        for s in range(3): window.add(s, learner.step(batch, s), batch["index"])
    assert reads == []
    with Count(): assert window.flush()[0]["loss"] > 0  # the only place that reads


def test_collapse_alarm_of_a_run(clips, tmp_path, monkeypatch, capsys):
    real = pretraining.AaSPLearner.loss

    def flat(self, batch, generator):
        loss, logs = real(self, batch, generator)
        return loss, logs | dict(target_std=logs["target_std"] * 0)

    monkeypatch.setattr(pretraining.AaSPLearner, "loss", flat)
    out = pretrain(calm(steps=8), clips, tmp_path / "run", **CALL)
    assert [a["series"] for a in out["alarms"]] == ["target_std"] and out["alarms"][0]["step"] == 4  # not in the warm-up, and once
    assert "COLLAPSE ALARM" in capsys.readouterr().out and "COLLAPSE ALARM" in (tmp_path / "run" / "log.txt").read_text()


def test_collapse_alarm_of_a_run_that_collapses(clips, tmp_path):
    """A teacher that copies the student and a learning rate fifty times too large: every token becomes one vector, while the
    normalised targets look as spread as ever; the same run as it should be raises no alarm."""
    no_teacher = dict(lr=0.05, ema_base=0.0, ema_end=0.0, contrastive_weight=0.0)
    good = pretrain(calm(steps=40, batch_size=4), clips, tmp_path / "good", **CALL)
    assert good["alarms"] == [] and read_metrics(tmp_path / "good")["teacher_std"].min() > 0.4
    bad = pretrain(calm(steps=20, batch_size=4, **no_teacher), clips, tmp_path / "bad", **CALL)
    alarms, seen = {a["series"]: a["step"] for a in bad["alarms"]}, read_metrics(tmp_path / "bad")
    assert np.nanmin(seen["teacher_std"]) < 0.1 and np.nanmin(seen["target_std"]) > 0.9
    assert alarms["teacher_std"] <= 20 and "target_std" not in alarms
    assert "COLLAPSE ALARM" in (tmp_path / "bad" / "log.txt").read_text()


def test_bad_steps_leave_the_weights_alone_and_are_counted(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)

    class Toy(loop.Learner):
        def loss(self, batch, generator): return self.model(batch["x"]).square().mean(), {}

    toy = Toy(model, loop.make_optimizer(model, 0.1), lambda s: 0.1)
    good, bad = torch.ones(2, 4), torch.full((2, 4), float("inf"))
    toy.step(dict(x=good), 0)
    before = [p.clone() for p in model.parameters()]
    assert toy.step(dict(x=bad), 1)["bad"] == 1 and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    run = RunDir(tmp_path / "run")
    out = fit(toy, iter([dict(x=x) for x in (good, bad, good, bad, good, good)]), run, 6, log_every=2, progress="none")
    assert out["bad_steps"] == 2 and out["step"] == 6 and all(torch.isfinite(p).all() for p in model.parameters())
    assert [b["step"] for b in json.loads((run.path / "bad_steps.json").read_text())] == [1, 3]
    run.close()


def test_gradient_norm_is_clipped_and_logged(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)

    class Toy(loop.Learner):
        def loss(self, batch, generator): return self.model(batch["x"]).sum() * 100, {}

    toy = Toy(model, torch.optim.SGD([dict(params=model.parameters(), names=["weight"])], 1.0), lambda s: 1.0, grad_clip=0.5)
    toy.optimizer.step = lambda: None
    logs = toy.step(dict(x=torch.ones(1, 1)), 0)
    assert logs["grad_norm"] == 100 and abs(model.weight.grad.item() - 0.5) < 1e-5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_which_parameter_to_change(clips, tmp_path, monkeypatch, error):
    def step(self, batch, s): raise error
    monkeypatch.setattr(loop.Learner, "step", step)
    with pytest.raises(RunError, match="out of memory.*accumulation_steps.*batch_size.*views"):
        pretrain(calm(), clips, tmp_path / "run", **CALL)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match='no GPU.*device="cpu"'): loop.pick_device("cuda")
    with pytest.raises(RunError, match="unknown device"): loop.pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Old GPU")
    with pytest.raises(RunError, match="Old GPU has no bf16: set precision to fp32"): loop.pick_device("cuda", "bf16")


# --- what people see -----------------------------------------------------------------------------------------------------

def test_picture_of_the_losses_is_replaced_in_place(trained, monkeypatch):
    import IPython
    import IPython.display
    from types import SimpleNamespace
    from unittest.mock import MagicMock
    shown, updated, picture = [], [], loop.Picture(trained, every=0)
    picture.draw()  # no notebook: nothing
    monkeypatch.setattr(IPython, "get_ipython", lambda: MagicMock())
    monkeypatch.setattr(IPython.display, "display", lambda fig, display_id: shown.append(fig) or SimpleNamespace(update=updated.append))
    for _ in range(3): picture.tick()
    assert len(shown) == 1 and len(updated) == 2
    assert shown[0].axes[0].get_title() == "loss" and len(updated[-1].axes[0].lines[0].get_ydata()) == 6


def test_a_run_that_has_stopped_keeps_no_model(clips, tmp_path, monkeypatch):
    import gc
    import weakref
    models, real = weakref.WeakSet(), pretraining.AaSPLearner.__init__

    def init(self, *a, **kw):
        real(self, *a, **kw)
        models.add(self.model)

    monkeypatch.setattr(pretraining.AaSPLearner, "__init__", init)
    pretrain(calm(), clips, tmp_path / "run", max_minutes=1e-9, **CALL)
    gc.collect()
    assert not len(models)


# --- comparing runs -----------------------------------------------------------------------------------------------------

def test_runs_are_compared(clips, trained, tmp_path, monkeypatch):
    from aasp_nb.cli import execute, find_notebook
    shutil.copytree(trained, tmp_path / "runs" / "first")
    pretrain(calm(lr=5e-4, seed=3), clips, tmp_path / "runs" / "second", max_steps=4, **CALL)
    monkeypatch.setenv("AASP_HOME", str(tmp_path))
    out = tmp_path / "out.ipynb"
    code, line = execute(find_notebook("compare_runs"), out, dict(table=str(tmp_path / "t.csv"), smooth=2), quiet=True)
    assert code == FINISHED, line
    shown = "\n".join(str(o.get("data", {}).get("text/markdown", "")) for c in nbformat.read(out, 4).cells for o in c.get("outputs", []))
    assert "| config.lr | 0.001 | 0.0005 |" in shown and "| config.seed | 0 | 3 |" in shown and "config.views" not in shown
    rows = (tmp_path / "t.csv").read_text().splitlines()
    assert rows[1].startswith("first,finished,6,6,") and rows[2].startswith("second,stopped,4,6,")
    assert any("image/png" in o.get("data", {}) for c in nbformat.read(out, 4).cells for o in c.get("outputs", []))
