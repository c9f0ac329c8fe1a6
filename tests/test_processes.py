"""Several training processes: the losses of one, kills of one of them, errors and bad steps of one of them."""
import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile as sf
import torch

from aasp_nb.audio import AudioError
from aasp_nb.clips import generate_clip
from aasp_nb.data import AudioDataset, Manifest
from aasp_nb.config import AaSPConfig, build, draw_masks
from aasp_nb.processes import rank
from aasp_nb.pretraining import pretrain
from aasp_nb.runs import RunError, latest_checkpoint, read_metrics

STEPS = 24
FIELDS = dict(views=3, batch_size=8, fill_crops=False, warmup_steps=4, steps=STEPS, norm_measure=False)
CALL = dict(device="cpu", cache=False, workers=0, log_every=1, progress="none")
SERIES = ("loss", "loss_mask", "loss_cls", "loss_con", "grad_norm", "lr", "momentum", "padded_share")


def config(**kw): return AaSPConfig.preset("nano", **{**FIELDS, **kw})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    old = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(old)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Twenty generated clips; every fifth is much shorter than a crop, so that the processes' padding differs."
    folder = tmp_path_factory.mktemp("clips")
    for i in range(20):
        wave = generate_clip("chirp", i, 0, seconds=0.1 if i % 5 == 0 else 1.1)
        sf.write(folder / f"{i:02d}.wav", np.asarray(wave), 16000)
    return folder


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    "Metrics of one process that is never interrupted, a batch in one part."
    run = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config(), clips, run, **CALL)
    return read_metrics(run)


def equal(run, whole, **tolerance):
    got = read_metrics(run)
    assert got["step"].tolist() == whole["step"].tolist()
    for name in SERIES: np.testing.assert_allclose(got[name], whole[name], err_msg=name, **tolerance)


class Killer(threading.Thread):
    "Kills one training process, once, when the run has logged a step."
    def __init__(self, run, step, number):
        super().__init__(daemon=True)
        self.run_dir, self.step, self.number, self.killed = Path(run), step, number, None
        self.start()

    def run(self):
        while self.killed is None:
            time.sleep(0.01)
            steps = read_metrics(self.run_dir).get("step", ())
            if not len(steps) or steps[-1] < self.step: continue
            members = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
            if len(members) != 2: continue
            self.killed = max(members, key=lambda p: p.pid) if self.number else min(members, key=lambda p: p.pid)
            self.killed.kill()


def test_one_of_two_processes_is_killed_and_the_losses_are_those_of_one(clips, whole, tmp_path, capfd):
    run, parted = tmp_path / "run", config(accumulation_steps=2)
    pretrain(parted, clips, run, max_steps=3, **CALL)  # begun by one process
    killer = Killer(run, 12, number=1)
    out = pretrain(parted, clips, run, resume=True, processes=2, save_every=5, **CALL)
    assert killer.killed and out["status"] == "finished" and out["processes"] == 2
    log = (run / "log.txt").read_text()
    assert "of 2 was lost" in log and "resumed from step-00000003" in log and "resumed from step-00000010" in log
    equal(run, whole, rtol=2e-4, atol=1e-6)
    assert whole["padded_share"].std() > 0  # the processes did differ


class Odd(AudioDataset):
    "Infinities in the second process's first clip of step 2; a file that cannot be read at step 4."
    def __getitem__(self, key):
        item, step = super().__getitem__(key), self.__dict__.setdefault("taken", 0) // 4
        self.taken += 1
        if rank() == 1 and step == 2: item["wave"] = item["wave"] * 1e25  # its power overflows
        if rank() == 1 and step == 4: raise AudioError("the disk of the second process is gone")
        return item


def test_negatives_come_from_all_processes_without_accumulation_too(clips, whole, tmp_path):
    "A batch in one part per process: the contrastive loss is that of the whole batch, not of a process's half."
    run = tmp_path / "run"
    pretrain(config(), clips, run, max_steps=2, processes=2, **CALL)
    got = read_metrics(run)
    for name in ("loss_con", "loss", "grad_norm"): np.testing.assert_allclose(got[name], whole[name][:2], err_msg=name, rtol=1e-3)


def test_bad_steps_and_errors_of_one_process_concern_all(clips, tmp_path):
    data = Odd(Manifest.open(clips), 1.0, fill_crops=False)
    with pytest.raises(AudioError, match="disk of the second process") as e:
        pretrain(config(), data, tmp_path / "run", processes=2, **CALL)
    assert "In process 1" in e.value.__notes__[0]
    bad = json.loads((tmp_path / "run" / "bad_steps.json").read_text())
    assert [b["step"] for b in bad] == [2] and len(set(bad[0]["clips"])) == 8  # the clips of both
    assert latest_checkpoint(tmp_path / "run" / "checkpoints")[2]["step"] == 4
    assert read_metrics(tmp_path / "run")["step"][-1] == 4


def test_numbers_of_processes_that_cannot_work(clips, tmp_path, monkeypatch):
    for n, message in ((3, "batch_size 8 is not a multiple"), (0, "at least 1"), (-2, "at least 1")):
        with pytest.raises(RunError, match=message): pretrain(config(), clips, tmp_path / "run", processes=n, **CALL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = {**CALL, "device": "cuda"}
    with pytest.raises(RunError, match="needs as many GPUs, 2 are visible"):
        pretrain(config(), clips, tmp_path / "run", processes=4, **cuda)
    with pytest.raises(RunError, match='device="cuda" instead of "cuda:1"'):
        pretrain(config(), clips, tmp_path / "run", processes=2, **{**CALL, "device": "cuda:1"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fields", [
    dict(), dict(preset="eat"), dict(target="logmel", depth=1), dict(adaptive=False), dict(contrastive_weight=0),
    dict(predictor="cnn", patch_embed="standard"), dict(mask_input=True, norm_scope="patch")], ids=str)
def test_every_parameter_has_a_gradient_in_every_step(fields):
    "DistributedDataParallel would wait for the ones without."
    given = {**FIELDS, "batch_size": 2, "lambda_depth": 1, "cnn_groups": 2, "n_frames": None, **fields}
    c = AaSPConfig.preset(given.pop("preset", "nano"), **given)
    model = build(c)
    model(torch.randn(2, 128, c.n_frames), draw_masks(c, 2))[0].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.cuda
def test_a_gpu_in_a_group_of_its_own(clips, tmp_path):
    "nccl with one process: the group, the averaged losses and DDP run on the GPU."
    from aasp_nb.processes import start_processes
    from aasp_nb.pretraining import _take_part, prepare_data, prepare_run
    from aasp_nb.runs import RunDir
    run = RunDir(tmp_path / "run")
    c = prepare_run(run, config(), prepare_data(config(), clips, False), torch.device("cuda"))
    run.close()
    kw = dict(log_every=1, progress="none", workers=0)
    start_processes(_take_part, 1, (c, clips, tmp_path / "run", "cuda", False, 1, kw), "cuda")
    assert np.isfinite(read_metrics(tmp_path / "run")["loss"]).all()
