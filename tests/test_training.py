"""Training as a whole: the golden curve, kills and resumes in real processes, and the pre-training notebook."""
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from aasp_nb.config import AaSPConfig
from aasp_nb.encoders import load_encoder
from aasp_nb.loop import TrainingError
from aasp_nb.pretraining import pretrain
from aasp_nb.runs import CheckpointError, RunError, latest_checkpoint, load_checkpoint, read_metrics, step_folders

sys.path.insert(0, str(Path(__file__).parent))
from golden_tiny import FILE, golden_losses  # noqa: E402

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "runs" / "pretrain.ipynb"
SMALL = dict(batch_size=4, steps=24, warmup_steps=4)
CALL = dict(device="cpu", cache=False, workers=0, log_every=1, progress="none")
SERIES = ("loss", "loss_mask", "loss_cls", "loss_con", "grad_norm", "lr", "momentum")


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    "The uninterrupted run that interrupted ones are compared with."
    run = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config(), clips, run, **CALL)
    return read_metrics(run)


def config(**kw): return AaSPConfig.preset("nano", **{**SMALL, **kw})


def agree(a, b):
    return all(np.array_equal(a[k], b[k]) for k in SERIES)


def test_golden_curve_first_20_losses(tmp_path):
    want = json.loads(FILE.read_text())["first_20"]
    np.testing.assert_allclose(golden_losses(tmp_path, 20), want, rtol=1e-3)


@pytest.mark.slow
def test_golden_curve_mean_of_200(tmp_path):
    want = json.loads(FILE.read_text())["mean_of_200"]
    assert abs(np.mean(golden_losses(tmp_path, 200)) - want) < 0.03 * want


# --- interruption -------------------------------------------------------------------------------------------------

RUN = """
import sys, json
from aasp_nb.config import AaSPConfig
from aasp_nb.pretraining import pretrain
data, run, fields = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
from aasp_nb import loop, pretraining
step = pretraining.AaSPLearner.step
def told(self, batch, s):
    print(s, flush=True)
    return step(self, batch, s)
pretraining.AaSPLearner.step = told
r = pretrain(AaSPConfig.preset("nano", **fields), data, run, resume="auto", device="cpu", cache=False, workers=1, log_every=1,
             save_every=5, progress="none")
print("status", r["status"], r["reason"], flush=True)
"""


def start(clips, run):
    "A real training process; prints each step as it begins."
    return subprocess.Popen([sys.executable, "-c", RUN, str(clips), str(run), json.dumps(SMALL)], stdout=subprocess.PIPE, text=True,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def until(process, step):
    "Wait for a step to begin."
    for line in process.stdout:
        if line.strip() == str(step): return
    raise AssertionError(f"the run ended before step {step}")


def finish(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out.splitlines()[-1]


@pytest.mark.slow
def test_killed_and_resumed_has_the_losses_of_an_uninterrupted_run(clips, whole, tmp_path):
    rng = random.Random(0)
    for step in (7, 16):
        process = start(clips, tmp_path / "run")
        until(process, step)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
        assert latest_checkpoint(tmp_path / "run" / "checkpoints")[2]["step"] % 5 == 0
    assert finish(start(clips, tmp_path / "run")) == "status finished None"
    got = read_metrics(tmp_path / "run")
    assert got["step"].tolist() == list(range(1, 25)) and agree(got, whole)


@pytest.mark.parametrize("name, group", [("SIGTERM", True), pytest.param("SIGINT", True, marks=pytest.mark.slow),
                                         pytest.param("SIGUSR1", False, marks=pytest.mark.slow)])
def test_signals_leave_a_checkpoint_at_a_step_boundary(clips, tmp_path, name, group):
    process = start(clips, tmp_path / "run")
    until(process, 3)
    (os.killpg if group else os.kill)(process.pid, getattr(signal, name))  # the group: its loader's worker too
    assert finish(process) == f"status stopped {name}"
    step = json.loads((tmp_path / "run" / "results.json").read_text())["step"]
    assert 4 <= step < 24 and latest_checkpoint(tmp_path / "run" / "checkpoints")[2]["step"] == step


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(clips, whole, tmp_path):
    run = tmp_path / "run"
    pretrain(config(), clips, run, max_steps=12, save_every=4, **CALL)
    last = step_folders(run / "checkpoints")[-1]
    data = bytearray((last / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (last / "model.safetensors").write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="step-00000012.*damaged"): pretrain(config(), clips, run, resume=True, **CALL)
    assert agree(read_metrics(run), whole)


def test_damaged_checkpoints_are_never_loaded(clips, tmp_path):
    pretrain(config(), clips, tmp_path / "run", max_steps=1, **CALL)
    folder = step_folders(tmp_path / "run" / "checkpoints")[0]
    rng, files = random.Random(0), sorted(folder.iterdir())
    tensors, state = load_checkpoint(folder)
    for _ in range(150):
        file = rng.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        if rng.random() < 0.7: bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else: del bad[rng.randrange(len(bad)):]
        file.write_bytes(bytes(bad))
        try: again, found = load_checkpoint(folder)
        except CheckpointError: pass
        else: assert found == state and all(torch.equal(v, again[f][k]) for f in tensors for k, v in tensors[f].items())
        file.write_bytes(good)


def test_two_runs_in_one_folder_are_refused(clips, tmp_path):
    process = start(clips, tmp_path / "run")
    until(process, 2)
    with pytest.raises(RunError, match="another process"): pretrain(config(), clips, tmp_path / "run", resume="auto", **CALL)
    process.kill()
    process.wait()


def test_time_limit_and_best_checkpoint(clips, tmp_path):
    out = pretrain(config(), clips, tmp_path / "a", max_minutes=1e-9, **CALL)
    assert (out["status"], out["reason"], out["step"]) == ("stopped", "max_minutes", 1)
    pretrain(config(), clips, tmp_path / "b", save_every=3, keep_last=2, **CALL)
    best = json.loads((tmp_path / "b" / "checkpoints" / "best.json").read_text())
    loss = read_metrics(tmp_path / "b")["loss"][2::3]
    assert best["score"] == loss.min() and len(step_folders(tmp_path / "b" / "checkpoints")) in (2, 3)


# --- what stops a run ---------------------------------------------------------------------------------------------

def test_losses_that_are_not_finite_are_skipped_counted_and_stop_the_run(clips, tmp_path, monkeypatch):
    from aasp_nb import loop, pretraining
    real = pretraining.AaSPLearner.loss

    def broken(self, batch, generator):
        loss, logs = real(self, batch, generator)
        return (loss * float("nan") if self.now >= 3 else loss), logs

    def step(self, batch, s):
        self.now = s
        return loop.Learner.step(self, batch, s)

    monkeypatch.setattr(pretraining.AaSPLearner, "loss", broken)
    monkeypatch.setattr(pretraining.AaSPLearner, "step", step, raising=False)
    with pytest.raises(TrainingError, match="not finite"): pretrain(config(steps=60), clips, tmp_path / "run", **CALL)
    bad = json.loads((tmp_path / "run" / "bad_steps.json").read_text())
    assert [b["step"] for b in bad] == list(range(3, 23)) and all(len(b["clips"]) == 4 for b in bad)


@pytest.mark.parametrize("change, message", [
    (dict(batch_size=64), "lower batch_size"), (dict(device="cuda"), "no GPU|unknown"), (dict(resume=True), "no run to resume")])
def test_mistakes_are_found_before_training(clips, tmp_path, change, message):
    if "device" in change and torch.cuda.is_available(): pytest.skip("SKIPPED: a GPU is here")
    fields = {k: v for k, v in change.items() if k in SMALL}
    call = {**CALL, **{k: v for k, v in change.items() if k not in SMALL}}
    with pytest.raises((RunError, ValueError), match=message): pretrain(config(**fields), clips, tmp_path / "run", **call)


# --- the notebook -------------------------------------------------------------------------------------------------

def notebook():
    return nbformat.read(NOTEBOOK, 4)


def execute(nb, path, home, **parameters):
    import papermill
    nbformat.write(nb, path)
    environment = {k: os.environ.get(k) for k in ("AASP_HOME", "OMP_NUM_THREADS")}
    os.environ.update(AASP_HOME=str(home), OMP_NUM_THREADS="1")
    try: return papermill.execute_notebook(path, path.with_suffix(".out.ipynb"), parameters, progress_bar=False, cwd="/",
                                           store_widget_state=False)
    finally:
        for k, v in environment.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})


def text(nb):
    return "\n".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", []))


def test_notebook_has_its_tag_and_every_field_of_the_configuration():
    from aasp_nb.settings import _assigned
    nb = notebook()
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert "skip_exec: true" in nb.cells[0].source and nb.cells[0].cell_type == "raw"
    assert code[0].metadata.tags == ["parameters"] and nb.metadata.kernelspec.name == "python3"
    names = list(_assigned(code[0].source))
    fields = [n for n in AaSPConfig.names() if n not in ("version", "preset_name")]
    assert [n for n in names if n in AaSPConfig.names()] == [n for n in names if n in fields] and set(fields) <= set(names)
    import papermill
    assert set(papermill.inspect_notebook(str(NOTEBOOK))) == set(names)


def test_notebook_trains_stops_and_resumes(clips, tmp_path):
    fields = {**SMALL, "steps": "6", "lr": "1e-3", "warmup_steps": None}
    same = dict(data=str(clips), run_dir="here", log_every=1, **fields)
    first = execute(notebook(), tmp_path / "a.ipynb", tmp_path, max_steps=2, **same)
    assert "stopped at step 2 of 6" in text(first)
    second = execute(notebook(), tmp_path / "b.ipynb", tmp_path, **same)
    assert "resumed from step-00000002" in text(second) and "finished at step 6 of 6" in text(second)
    results = json.loads((tmp_path / "runs" / "here" / "results.json").read_text())
    assert results["status"] == "finished" and results["config"]["lr"] == 1e-3 and results["environment"]["versions"]["torch"]
    assert any("image/png" in o.get("data", {}) for c in second.cells for o in c.get("outputs", []))
    assert (tmp_path / "b.out.ipynb").stat().st_size < 5e5
    encoder, found = load_encoder(tmp_path / "runs" / "here")
    assert found.to_dict() == results["config"]


@pytest.mark.parametrize("change, message", [
    (dict(stepz=3), "did you mean 'steps'"), (dict(views="many"), "views must be")])
def test_notebook_refuses_what_it_does_not_know(tmp_path, change, message):
    from papermill.exceptions import PapermillExecutionError
    with warnings.catch_warnings(), pytest.raises(PapermillExecutionError, match=message):
        warnings.simplefilter("ignore")
        execute(notebook(), tmp_path / "a.ipynb", tmp_path / "home", **change)
    assert not (tmp_path / "home").exists()


def test_notebook_that_lost_its_tag_stops_before_any_work(tmp_path):
    from papermill.exceptions import PapermillExecutionError
    nb = notebook()
    for c in nb.cells: c.metadata.pop("tags", None)
    with pytest.raises(PapermillExecutionError, match="tag"): execute(nb, tmp_path / "a.ipynb", tmp_path / "home", steps=3)
    assert not (tmp_path / "home").exists()
