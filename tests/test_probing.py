"""The linear-probe notebook under papermill, a trained checkpoint as its input, and real audio where there is some."""
import csv
import json
import os
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest

from aasp_nb.benchmarks import read_results
from aasp_nb.clips import write_clips
from aasp_nb.data import Manifest
from aasp_nb.config import AaSPConfig, build_encoder
from aasp_nb.probing import open_model, probe_preset, probe_summary, run_probe
from aasp_nb.encoders import save_encoder

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs" / "runs" / "linear_probe.ipynb"


TABLE_2 = dict(us8k=(8000, 128), nsynth=(50_000, 512), cremad=(50_000, 16))  # steps, clips per step, as printed


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name):
    config = probe_preset(name)
    assert (config.steps, config.batch_size) == TABLE_2[name] and config.protocol == "paper"
    assert (config.schedule, config.weight_decay, config.lr, len(config.seeds)) == ("cosine", 0.0, 1e-3, 3)


@pytest.mark.skipif("AASP_PAPER" not in os.environ, reason="AASP_PAPER (folder of the paper's tables) is not set")
def test_copies_equal_the_table():
    with open(Path(os.environ["AASP_PAPER"]) / "table2_linear_probing.csv", newline="") as f:
        rows = {r["hyperparameter"]: r for r in csv.DictReader(f)}
    for name, (steps, batch) in TABLE_2.items():
        config = probe_preset(name)
        assert (float(rows["training_steps"][name]), float(rows["batch_size"][name])) == (steps, batch)
        assert float(rows["peak_lr"][name]) == config.lr and float(rows["weight_decay"][name]) == config.weight_decay


@pytest.fixture
def run(tmp_path, monkeypatch):
    "Execute the notebook in another folder, with AASP_HOME in a path with blanks and an umlaut."
    import papermill
    home = tmp_path / "ein Ordner mit ü"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AASP_HOME", str(home))

    def execute(**parameters):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", parameters, progress_bar=False, store_widget_state=False)
        return nbformat.read(tmp_path / "out.ipynb", 4)
    execute.home, execute.out = home, tmp_path / "out.ipynb"
    return execute


def texts(notebook):
    "All text that a notebook shows."
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/markdown", "") for o in outputs)


def test_notebook_probes_a_checkpoint(run):
    config = AaSPConfig.preset("tiny", depth=1)
    saved = save_encoder(build_encoder(config), config, run.home / "model")
    data = write_clips(run.home / "clips", per_class=6, seed=0, seconds=0.5)
    shown = texts(run(data=str(data), checkpoint=str(saved), steps="50", seeds="3,4", run_dir=str(run.home / "p"), dataset="made"))
    assert "**made**, paper/us8k" in shown and "| last step | **" in shown and "looks at the test score" in shown
    assert '"steps": 50' in shown and "Hardest classes" in shown
    results = json.loads((run.home / "p" / "results.json").read_text())
    rows = read_results(run.home / "results.csv")
    assert [r["value"] for r in rows] == [r["value"] for r in results["rows"]] and len(rows) == 2 * 3
    assert {r["checkpoint"] for r in rows} == {open_model(saved).fingerprint} and {r["seed"] for r in rows} == {3, 4}
    assert "-p steps 50" in rows[0]["command"] and rows[0]["revision"] and json.loads(rows[0]["settings"])["seeds"] == [3, 4]
    assert results["summaries"]["last_step"]["low"] <= results["summaries"]["last_step"]["mean"] <= results["summaries"]["last_step"]["high"]


@pytest.mark.parametrize("parameters,message", [
    (dict(step=5), "did you mean 'steps'"),
    pytest.param(dict(steps="many"), "steps must be", marks=pytest.mark.slow),
    pytest.param(dict(benchmark="esc5"), "did you mean 'esc50'", marks=pytest.mark.slow)])
def test_notebook_refuses_before_any_work(run, parameters, message):
    import papermill
    with pytest.raises(papermill.PapermillExecutionError, match=message): run(**parameters)
    assert not (run.home / "runs").exists() and not (run.home / "cache").exists()


def test_teacher_and_student_are_told_apart(tmp_path):
    config = AaSPConfig.preset("tiny", depth=1)
    saved = save_encoder(build_encoder(config), config, tmp_path / "model")
    with pytest.raises(ValueError, match="teacher"): open_model(saved, which="pupil")


def test_features_are_cached_by_weights_data_and_settings(tmp_path):
    "The same question again computes nothing; another checkpoint, other clips or another setting do."
    from aasp_nb.probing import model_features
    m = Manifest.open(write_clips(tmp_path / "clips", per_class=2, seed=0, seconds=0.3))
    model, cache = open_model("untrained", depth=1), tmp_path / "cache"
    count = lambda: len(list(cache.glob("*.safetensors")))
    first, _ = model_features(model, m, normalization="checkpoint", cache=cache)
    again, _ = model_features(model, m, normalization="checkpoint", cache=cache)
    assert count() == 1 and np.array_equal(first, again)
    others = (dict(model=open_model("untrained", seed=1, depth=1)), dict(manifest=m.take(range(5))), dict(frames=48),
              dict(long="windows"), dict(pooling="frequency"), dict(pooling="small"), dict(layers=(1,)))
    for k, change in enumerate(others):
        model_features(**{**dict(model=model, manifest=m, normalization="checkpoint", cache=cache), **change})
        assert count() == 2 + k, change
    assert model_features(model, m, pooling="frequency", cache=cache)[0].shape == (len(m), 8 * 192)
    x, settings = model_features(model, m, pooling="small", layers="1", cache=None)
    assert x.shape == (len(m), 2 * 8 * 192) and (settings["pooling"], settings["layers"]) == ("frequency+std", 1)
    assert not {"pooling", "layers"} & set(model_features(model, m, pooling="paper", cache=None)[1])  # the protocol's own is not a choice


@pytest.mark.slow
def test_two_processes_and_one_give_the_same_features(tmp_path):
    "Of an encoder and of a baseline; a clip that cannot be read is told and counted as by one process."
    from aasp_nb.audio import AudioError
    from aasp_nb.probing import model_features, ProbeError
    table = write_clips(tmp_path / "clips", per_class=2, seed=0, seconds=0.3)
    m = Manifest.open(table)
    m.file(3).write_bytes(b"no audio")
    for model in (open_model("untrained", depth=1), open_model("modulation")):
        for more in (dict(), dict(frames=48)):
            given = dict(model=model, manifest=m, max_broken=1, **more)
            with pytest.warns(UserWarning, match="broken clip"): one = model_features(**given)[0]
            with pytest.warns(UserWarning, match="broken clip"): two = model_features(**given, processes=2)[0]
            assert np.isnan(one[3]).all() and np.isnan(two[3]).all() and np.isfinite(np.delete(two, 3, 0)).all()
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    with pytest.raises(AudioError, match="1 of .* clips cannot be read, 0 are allowed"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_features(model, m, processes=2)
    with pytest.raises(ProbeError, match="processes must lie between 1"): model_features(model, m, processes=0)


def test_folds_and_split_agree_on_what_is_tested(tmp_path):
    m = Manifest.open(write_clips(tmp_path / "clips", per_class=10, seed=0, seconds=0.5))
    options = dict(steps=30, evaluations=3, seeds=(0,), cache=tmp_path / "cache", device="cpu")
    by_split, _ = run_probe("logmel", m, use="split", **options)
    by_fold, record = run_probe("logmel", m, use="folds", **options)
    assert probe_summary(by_fold)["n"] == len(m) and record["summaries"]["last_step"]["folds"] == len(m.values("fold"))
    assert probe_summary(by_split)["n"] == m.columns["split"].count("test")


def test_a_few_real_clips(real_data):
    "Spoken digits or another small folder: log-mel statistics are well above chance and below perfection."
    folder = next((real_data / n for n in ("fsdd", "instrument_family", "ravdess") if (real_data / n / "manifest.csv").is_file()), None)
    if folder is None: pytest.skip("SKIPPED: no fsdd, instrument_family or ravdess in AASP_DATA")
    m = Manifest.open(folder)
    keep = np.concatenate([np.flatnonzero(np.array(m.columns["split"]) == s)[::6] for s in ("train", "test")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, record = run_probe("modulation", m.take(keep), steps=300, cache=None, device="cpu", use="split")
    chance = 1 / len(record["classes"])
    assert record["unreadable"] == 0 and 2 * chance < record["summaries"]["last_step"]["mean"] < 1, record["summaries"]
