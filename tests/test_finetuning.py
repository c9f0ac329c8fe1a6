"""Fine-tuning against Table I, killed and resumed in a real process, its notebook and the tables under papermill."""
import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from aasp_nb.benchmarks import BENCHMARKS, append_results, read_results
from aasp_nb.clips import write_clips
from aasp_nb.data import Manifest
from aasp_nb.evaluation import RULES
from aasp_nb.finetuning import FINETUNE_PRESETS, FinetuneConfig, finetune, load_classifier
from aasp_nb.config import AaSPConfig, build_encoder
from aasp_nb.encoders import save_encoder
from aasp_nb.runs import latest_checkpoint, read_metrics

RUNS = Path(__file__).resolve().parent.parent / "nbs" / "runs"
TINY = dict(embed_dim=16, depth=2, num_heads=2, sblu_hidden=2, sblu_dim=4, lambda_dim=8, predictor_heads=2, predictor_dim=16)
CALL = dict(device="cpu", cache=False, progress="none", log_every=1)
TABLE_1 = dict(  # as printed; lr and betas are EAT's
    as2m=dict(betas=(0.9, 0.95), lr=5e-5, min_lr=0.0, layer_decay=0.70, weight_decay=0.05, steps=300_000, warmup_steps=30_000,
              batch_size=128, mixup=0.8, drop_path=0.1),
    as20k=dict(betas=(0.9, 0.95), lr=5e-5, min_lr=0.0, layer_decay=0.70, weight_decay=0.05, steps=40_000, warmup_steps=4_000,
               batch_size=128, mixup=0.8, drop_path=0.1),
    esc50=dict(betas=(0.9, 0.95), lr=5e-5, min_lr=0.0, layer_decay=0.65, weight_decay=0.05, steps=8_000, warmup_steps=800,
               batch_size=128, mixup=0.0, drop_path=0.1),
    scv2=dict(betas=(0.9, 0.95), lr=2e-4, min_lr=0.0, layer_decay=0.75, weight_decay=0.05, steps=160_000, warmup_steps=16_000,
              batch_size=128, mixup=0.8, drop_path=0.1))
CSV_NAMES = dict(lr="peak_lr", steps="training_steps")


@pytest.fixture(scope="module")
def clips(labelled_clips): return labelled_clips


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    "A saved encoder that was never trained."
    torch.manual_seed(0)
    config = AaSPConfig.preset("tiny", **TINY)
    return save_encoder(build_encoder(config), config, tmp_path_factory.mktemp("model") / "encoder")


# --- the recipe ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name):
    config = FinetuneConfig.preset(name)
    assert {k: getattr(config, k) for k in TABLE_1[name]} == TABLE_1[name]


def test_text_of_section_4b():
    configs = {n: FinetuneConfig.preset(n) for n in FINETUNE_PRESETS}
    assert {n: c.ema for n, c in configs.items()} == dict(as2m=0.995, as20k=0.995, esc50=0.0, scv2=0.995, nsynth=0.995)
    assert {n: c.spec_augment for n, c in configs.items()} == dict(as2m=0.2, as20k=0.2, esc50=0.0, scv2=0.2, nsynth=0.2)
    assert (configs["as2m"].sampling, configs["as2m"].epoch_clips) == ("balanced", 200_000)
    assert all(c.sampling == "uniform" for n, c in configs.items() if n != "as2m")
    assert all(c.frames == BENCHMARKS[n].frames and c.selection == "last_step" for n, c in configs.items())


@pytest.mark.skipif("AASP_PAPER" not in os.environ, reason="AASP_PAPER (folder of the paper's tables) is not set")
def test_copies_equal_the_table():
    with open(Path(os.environ["AASP_PAPER"]) / "table1_training.csv", newline="") as f: rows = list(csv.DictReader(f))
    for name, ours in TABLE_1.items():
        printed = {r["hyperparameter"]: r[f"finetune_{name}"] for r in rows}
        for key, value in ours.items():
            text = printed[CSV_NAMES.get(key, key)]
            assert (tuple(map(float, text.split())) if isinstance(value, tuple) else float(text)) == value, (name, key, text)


# --- runs ---------------------------------------------------------------------------------------------------------

def test_learns_what_sounds_are_from_scratch(tmp_path):
    "Steady noise against fast clicks against a voice: better than chance by far, and the saved model says the same."
    m = Manifest.open(write_clips(tmp_path / "clips", per_class=20, seed=1, seconds=0.5)).select(
        label=["noise", "clicks_fast", "voice"])
    config = AaSPConfig.preset("tiny", **{**TINY, "embed_dim": 32})
    torch.manual_seed(0)
    recipe = FinetuneConfig.preset("esc50", steps=60, batch_size=12, lr=3e-3, layer_decay=0.9, frames=None, evaluations=2)
    out = finetune((build_encoder(config), config), m, tmp_path / "run", recipe, **CALL)
    assert out["scores"]["last_step"]["test"] > 0.6 and out["metric"] == "accuracy" and out["n"]["test"] == 12, out["scores"]
    loss = read_metrics(tmp_path / "run")["loss"]
    assert loss[-10:].mean() < 0.8 * loss[:10].mean()
    test = m.select(split="test")
    model, wave = load_classifier(tmp_path / "run" / "model"), []
    from aasp_nb.audio import load_audio
    for i in range(len(test)): wave.append(torch.nn.functional.pad(load_audio(test.file(i)), (0, 2240)))
    answer = model(torch.stack(wave), torch.full((12,), 8000)).argmax(-1)
    assert np.mean(answer.numpy() == test.targets(model.classes)) == out["scores"]["last_step"]["test"]


def test_several_labels_and_class_balanced_sampling(clips, encoder, tmp_path):
    m = Manifest.open(clips)
    m.columns["label"] = [l + (";loud" if i % 2 else "") for i, l in enumerate(m.columns["label"])]
    recipe = FinetuneConfig.preset("as2m", steps=3, batch_size=10, frames=None, epoch_clips=30, evaluations=1)
    out = finetune(encoder, m, tmp_path / "run", recipe, **CALL)
    assert out["metric"] == "mAP" and len(out["classes"]) == 11 and 0 < out["scores"]["last_step"]["test"] <= 1
    assert {k: out["settings"][k] for k in ("steps", "frames", "epoch_clips")} == dict(steps=3, frames=64, epoch_clips=30)


RUN = """
import sys, json
import aasp_nb.finetuning as f
step = f.FinetuneLearner.step
def told(self, batch, s):
    print(s, flush=True)
    return step(self, batch, s)
f.FinetuneLearner.step = told
start, data, run, fields = sys.argv[1:4] + [json.loads(sys.argv[4])]
f.finetune(start, data, run, f.FinetuneConfig.preset("scv2", **fields), resume="auto", device="cpu", cache=False,
           progress="none", log_every=1, save_every=4)
"""


def test_killed_and_resumed_equals_an_uninterrupted_run(clips, encoder, tmp_path):
    fields = dict(steps=14, batch_size=10, lr=3e-3, evaluations=4, ema=0.5, frames=None)
    whole = finetune(encoder, clips, tmp_path / "whole", FinetuneConfig.preset("scv2", **fields), **CALL)
    process = subprocess.Popen([sys.executable, "-c", RUN, str(encoder), str(clips), str(tmp_path / "run"), json.dumps(fields)],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert any(line.strip() == "9" for line in process.stdout)
    process.kill()
    process.wait()
    assert latest_checkpoint(tmp_path / "run" / "checkpoints")[2]["step"] in (4, 8)
    again = finetune(encoder, clips, tmp_path / "run", FinetuneConfig.preset("scv2", **fields), resume="auto", **CALL)
    assert again["scores"] == whole["scores"] and again["curve"] == whole["curve"]
    assert np.array_equal(*(read_metrics(tmp_path / n)["loss"] for n in ("run", "whole")))


@pytest.mark.slow
def test_two_processes_and_one_give_the_same_scores(clips, encoder, tmp_path):
    "Mixup across the batch, masks, averaged weights and patch dropout; without drop path, which each process draws for itself."
    from aasp_nb.runs import RunError
    fields = dict(steps=8, batch_size=8, lr=3e-3, evaluations=2, ema=0.5, frames=None, drop_path=0.0, mixup=0.8, spec_augment=0.2,
                  patch_dropout=0.3)
    config = FinetuneConfig.preset("scv2", **fields)
    one = finetune(encoder, clips, tmp_path / "one", config, **CALL)
    finetune(encoder, clips, tmp_path / "two", FinetuneConfig.preset("scv2", **fields, accumulation_steps=1), max_steps=3, processes=2, **CALL)
    two = finetune(encoder, clips, tmp_path / "two", config, processes=2, resume=True, **CALL)
    assert (one["processes"], two["processes"], two["status"]) == (1, 2, "finished")
    a, b = (read_metrics(tmp_path / n) for n in ("one", "two"))
    for name in ("loss", "grad_norm", "lr"): np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-6, err_msg=name)
    waves = torch.randn(4, 8000, generator=torch.Generator().manual_seed(0))
    p, q = (load_classifier(tmp_path / n / "model")(waves) for n in ("one", "two"))
    np.testing.assert_allclose(p.numpy(), q.numpy(), atol=1e-4)
    assert abs(one["scores"]["last_step"]["test"] - two["scores"]["last_step"]["test"]) < 0.1  # a clip or two on the border
    with pytest.raises(RunError, match="batch_size 8 is not a multiple"):
        finetune(encoder, clips, tmp_path / "three", config, processes=3, **CALL)



def test_a_few_real_clips(real_data, encoder, tmp_path):
    folder = next((real_data / n for n in ("fsdd", "ravdess", "instrument_family") if (real_data / n / "manifest.csv").is_file()), None)
    if folder is None: pytest.skip("SKIPPED: no fsdd, ravdess or instrument_family in AASP_DATA")
    m = Manifest.open(folder)
    split = np.array(m.columns["split"])
    m = m.take(np.concatenate([np.flatnonzero(split == s)[::40] for s in ("train", "valid", "test")]))
    recipe = FinetuneConfig.preset("scv2", steps=4, batch_size=8, frames=None, evaluations=2)
    out = finetune(encoder, m, tmp_path / "run", recipe, **CALL)
    assert not out["broken_clips"] and 0 <= out["scores"]["validation"]["test"] <= 1
    assert out["config"]["frames"] % 16 == 0 and -15 < out["norm"][0] < 0


# --- notebooks ----------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path, monkeypatch):
    "Execute a notebook in another folder, with AASP_HOME in a path with blanks and an umlaut."
    import papermill
    home = tmp_path / "ein Ordner mit ü"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AASP_HOME", str(home))

    def execute(name, **parameters):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(RUNS / name, tmp_path / "out.ipynb", parameters, progress_bar=False,
                                       store_widget_state=False)
        outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
        return "\n".join(o.get("text", "") or o.get("data", {}).get("text/markdown", "") for o in outputs)
    execute.home = home
    return execute


@pytest.mark.parametrize("name", ["finetune.ipynb", "tables.ipynb"])
def test_notebooks_have_their_parameters_tag(name):
    notebook = nbformat.read(RUNS / name, 4)
    assert notebook.cells[0].cell_type == "raw" and "skip_exec: true" in notebook.cells[0].source
    first = next(c for c in notebook.cells if c.cell_type == "code")
    assert first.metadata.get("tags") == ["parameters"]
    if name == "finetune.ipynb":
        assert set(FinetuneConfig.__dataclass_fields__) - {"seed", "preset_name", "version"} <= {
            line.split(":")[0].split(" =")[0] for line in first.source.splitlines()}


def test_notebook_stops_resumes_and_records_once(run, clips, encoder):
    given = dict(data=str(clips), checkpoint=str(encoder), dataset="made", seeds="3,4", preset="esc50", frames="64",
                 steps="4", batch_size="8", evaluations="2", device="cpu", cache="False", run_dir="ft")
    shown = run("finetune.ipynb", **given, max_steps=1)
    assert "2 runs are not finished" in shown and not read_results(run.home / "results.csv")
    shown = run("finetune.ipynb", **given)
    assert "**made**, esc50" in shown and "| last step | **" in shown and "looks at the test score" in shown
    rows = read_results(run.home / "results.csv")
    assert len(rows) == 2 * 3 and {r["rule"] for r in rows} == {"last_step", "validation", "best_step_on_test"}
    settings = json.loads(rows[0]["settings"])
    made = settings["origin"]["config"]
    assert settings["steps"] == 4 and made["phase"] == "even" and made["kernel_size"] == 63
    assert {r["pretrain_seed"] for r in rows} == {0} and len({r["identity"] for r in rows}) == 2
    assert {r["task"] for r in rows} == {"finetune"} and "-p steps 4" in rows[0]["command"]
    results = json.loads((run.home / "runs" / "ft" / "results.json").read_text())
    assert results["missing"] == 0 and results["summaries"]["last_step"]["seeds"] == 2 and results["interval"]


def test_notebook_refuses_before_any_work(run):
    import papermill
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'mixup'"): run("finetune.ipynb", mixpu=0.3)
    assert not (run.home / "runs").exists() and not (run.home / "cache").exists()


def test_committed_results_are_whole():
    "Every score of the small-scale result: all rules by one vocabulary, all folds, no local paths."
    path = RUNS.parent.parent / "figures" / "results_real_audio.csv"
    rows = read_results(path)
    assert {r["rule"] for r in rows} == set(RULES) and all(0 < r["value"] < 1 and r["metric"] == "accuracy" for r in rows)
    assert all("(opus" in r["dataset"] for r in rows), "copies are named for what they are"
    runs = {(r["task"], r["model"], r["seed"]): {q["fold"] for q in rows if (q["task"], q["model"], q["seed"]) == (
        r["task"], r["model"], r["seed"]) and q["dataset"].startswith("esc50")} for r in rows}
    assert set(map(frozenset, runs.values())) <= {frozenset("12345"), frozenset()}, "all folds of ESC-50, or none for a further seed"
    assert any(runs.values())
    commands = {r["command"] for r in rows}
    assert all("-p data $AASP_DATA/" in c for c in commands) and not any(" /" in c for c in commands)


def test_tables_keep_copies_out_of_official_columns(run):
    common = dict(task="finetune", protocol="paper/esc50", model="mine", checkpoint="abc", scale="tiny, aape, 9 of 9 steps",
                  split="test", metric="accuracy", n=400)
    settings = json.dumps(dict(steps=50, hours_heard=12.5))
    append_results(run.home / "results.csv", [
        dict(common, dataset=d, seed=s, fold=f, rule=r, value=v, settings=settings)
        for d, v in (("ESC-50", 0.111), ("ESC-50 (own copy)", 0.222), ("esc50 (opus, rejoined)", 0.333))
        for s in (0, 1) for f in (1, 2) for r in ("last_step", "best_step_on_test")])
    append_results(run.home / "results.csv", [
        dict(common, dataset="US8K", task="linear_probe", protocol="paper/us8k", seed=0, fold=f, rule="last_step", value=0.5)
        for f in range(1, 11)])
    shown = run("tables.ipynb")
    tables = {t.split(":")[0].split("\n")[0]: t for t in (run.home / "tables" / "tables.md").read_text().split("### ")[1:]}
    three, four, other = tables["Table III"], tables["Table IV"], tables["Other data"]
    assert "| AaPE | 87 | AudioSet | 512,000 | 49.8 | 41.9 | 97.5 | 97.9 | paper, version 1 |" in three
    assert "11.1" in three and "2 of 5 folds" in three and "changed: steps" in three and "12.5 hours heard" in three
    assert not {"22.2", "33.3"} & set(three.replace("|", " ").split()) and "22.2" in other and "33.3" in other
    assert "| model | pre-trained | hours heard | ESC-50 (own copy), accuracy % | esc50 (opus, rejoined), accuracy % |" in other
    mine = next(line for line in three.splitlines() if "**mine**" in line)
    assert [c.strip() for c in mine.split("|")][5:7] == ["", ""], "not run: blank"
    assert "| 50.0 +- 0.0 over folds (4,000 of 8,732 clips; 1 seed) |" in four and "MATPAC/n10" in four and "11.1" not in other
    assert three.splitlines()[2].startswith("Ours: tiny, aape, 9 of 9 steps") and "last step" in shown
