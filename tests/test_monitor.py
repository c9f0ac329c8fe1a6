"""The monitor in a run: rows at its interval and at the end, the same after a kill, the same with several processes."""
import numpy as np
import pytest
import torch

from aasp_nb import pretraining
from aasp_nb.clips import write_clips
from aasp_nb.config import AaSPConfig
from aasp_nb.data import ManifestError
from aasp_nb.pretraining import pretrain
from aasp_nb.runs import read_metrics

CALL = dict(device="cpu", cache=False, workers=0, log_every=2, progress="none", monitor_clips=24)
SEEN = ("student_knn", "student_ridge", "student_rank", "teacher_knn", "teacher_ridge", "teacher_rank")


def config(**kw): return AaSPConfig.preset("nano", **{**dict(batch_size=4, steps=11, warmup_steps=2, mix_ratio=0.4, gain_db=3.0), **kw})


@pytest.fixture(scope="module")
def watched(clips, tmp_path_factory):
    run = tmp_path_factory.mktemp("watched") / "run"
    return pretrain(config(), clips, run, monitor=clips, monitor_every=3, **CALL), read_metrics(run)


def test_rows_at_the_interval_and_at_the_end(watched):
    out, rows = watched
    have = {int(s) for s, v in zip(rows["step"], rows["student_knn"]) if np.isfinite(v)}
    assert have == {4, 6, 10, 11}  # the rows in which a multiple of 3 has passed, and the last
    for name in SEEN: assert np.isfinite(rows[name][-1]) and rows[name][-1] == out["last"][name]
    assert 0 < out["monitor_share"] < 1
    for name in ("target_rank", "prediction_rank", "token_rank", "cls_rank"): assert (rows[name] >= 1).all()
    for name in ("target_clip_share", "target_position_share", "teacher_clip_share"):
        assert ((rows[name] >= 0) & (rows[name] <= 1)).all()


def test_resumed_run_and_run_without_monitor_agree(clips, watched, tmp_path):
    whole = watched[1]
    pretrain(config(), clips, tmp_path / "run", monitor=clips, monitor_every=3, max_steps=7, **CALL)
    pretrain(config(), clips, tmp_path / "run", "auto", monitor=clips, monitor_every=3, **CALL)
    rows = read_metrics(tmp_path / "run")
    last = {n: rows[n][-1] for n in SEEN}
    assert last == {n: whole[n][-1] for n in SEEN}
    bare = pretrain(config(), clips, tmp_path / "bare", **CALL)
    assert bare["last"]["loss"] == whole["loss"][-1] and "student_knn" not in bare["last"]  # it changes nothing of the training


def test_two_processes(clips, watched, tmp_path):
    pretrain(config(), clips, tmp_path / "run", monitor=clips, monitor_every=3, processes=2, **CALL)
    rows = read_metrics(tmp_path / "run")
    np.testing.assert_allclose(rows["loss"], watched[1]["loss"], rtol=1e-4)
    np.testing.assert_allclose(rows["student_rank"], watched[1]["student_rank"], rtol=1e-3)


def test_a_monitor_without_usable_clips_is_refused_before_the_first_step(clips, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.wav").write_bytes(b"no audio")
    (tmp_path / "none" / "b.wav").write_bytes(b"no audio")
    with pytest.raises(ManifestError, match="0 of 2 clips"):
        pretrain(config(), clips, tmp_path / "run", monitor=tmp_path / "none", **CALL)
    assert not (tmp_path / "run" / "metrics.csv").exists()
    with pytest.raises(ManifestError, match="monitor_every"):
        pretrain(config(), clips, tmp_path / "other", monitor=clips, monitor_every=0, **CALL)


# --- alarms ------------------------------------------------------------------------------------------------------------------------

def positions_drown(model):
    "The initialisation of the recipe that failed: patch tokens a twentieth as large, so that positions drown the content."
    with torch.no_grad():
        for p in model.student.patch_embed.fusion.proj.parameters(): p.mul_(0.05)
        model.teacher.load_state_dict(model.student.state_dict())
    return model


def first_tenth(clips, folder, preset, monkeypatch, failed, steps, **kw):
    real = pretraining.build
    with monkeypatch.context() as m:
        if failed: m.setattr(pretraining, "build", lambda c: positions_drown(real(c)))
        norm = dict(target_norm="token", contrastive_weight=0.1) if failed else {}
        c = AaSPConfig.preset(preset, steps=10 * steps, warmup_steps=steps, **kw, **norm)
        return pretrain(c, clips, folder, max_steps=steps, **CALL)["alarms"]


def test_the_recipe_that_failed_trips_an_alarm_in_its_first_tenth(clips, tmp_path, monkeypatch):
    alarms = first_tenth(clips, tmp_path / "bad", "nano", monkeypatch, True, 20, batch_size=8)
    assert "target_position_share" in [a["series"] for a in alarms] and max(a["step"] for a in alarms) <= 20
    assert "set target_norm to channel" in (tmp_path / "bad" / "log.txt").read_text()


def test_a_healthy_run_trips_none(clips, tmp_path, monkeypatch):
    assert first_tenth(clips, tmp_path / "good", "nano", monkeypatch, False, 20, batch_size=8) == []


@pytest.mark.slow
@pytest.mark.parametrize("failed", [True, False])
def test_the_same_of_tiny(tmp_path, monkeypatch, failed):
    clips = write_clips(tmp_path / "clips", per_class=20, seed=0, seconds=2.0)
    alarms = first_tenth(clips, tmp_path / "run", "tiny", monkeypatch, failed, 60, views=4, batch_size=16)
    assert bool(alarms) == failed, alarms
