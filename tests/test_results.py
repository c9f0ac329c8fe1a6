"""Results from the notebooks that make them to the tables that show them: what is one run, and what may stand in one row."""
import json
from pathlib import Path

import nbformat
import pytest
import torch

from aasp_nb.ablations import ResultsError, compare, comparison_table, load_results, summarise
from aasp_nb.benchmarks import append_results, read_results
from aasp_nb.config import AaSPConfig, build_encoder
from aasp_nb.data import Manifest
from aasp_nb.encoders import save_encoder
from aasp_nb.finetuning import FinetuneConfig, finetune_all, record_results
from aasp_nb.pretraining import pretrain
from aasp_nb.probing import open_model, run_probe, save_probe

RUNS = Path(__file__).resolve().parent.parent / "nbs" / "runs"
TINY = dict(embed_dim=16, depth=1, num_heads=2, sblu_hidden=2, sblu_dim=4, lambda_dim=8, lambda_depth=1, predictor_heads=2,
            predictor_dim=16, predictor_depth=1, views=2, batch_size=4)


@pytest.fixture(scope="module")
def clips(labelled_clips): return labelled_clips


def run_cells(name: str, **parameters) -> dict:
    "Execute a run notebook's cells in this process, with parameters as papermill gives them; its variables."
    first, *cells = [c.source for c in nbformat.read(RUNS / name, 4).cells if c.cell_type == "code"]
    given = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
    scope = {"In": ["", first, given]}
    for source in (first, given, *cells): exec(source, scope)
    return scope


def test_a_finished_run_is_known_by_all_that_it_was_asked_for(clips, tmp_path, capsys):
    "The same again is skipped; with another width, target, protocol, length, seed or label it is another run, and its own table."
    common = dict(data=str(clips.parent), labelled=str(clips.parent), tables="VI", steps=1, probe_steps=3, device="cpu",
                  work=str(tmp_path), dataset="sounds", results_csv=str(tmp_path / "results.csv"))
    def shown(**changed):
        over = {**TINY, **changed.pop("overrides", {})}
        run_cells("ablations.ipynb", **{**common, "overrides": json.dumps(over), **changed})
        return capsys.readouterr().out
    assert "already" not in shown() and shown().count("in the table already") == 2
    other = tmp_path / "other.csv"
    relabelled = Manifest.open(clips)
    relabelled.columns["label"][0] = relabelled.columns["label"][-1]
    relabelled.to_csv(clips.parent / "relabelled.csv")
    for change in (dict(overrides=dict(embed_dim=32)), dict(overrides=dict(target="logmel")), dict(probe_steps=4),
                   dict(labelled=str(clips.parent / "relabelled.csv")), dict(pretrain_seeds="1")):
        assert "already" not in shown(**change), change
    rows = read_results(tmp_path / "results.csv")
    assert len({r["identity"] for r in rows}) == 2 * 6 and {r["pretrain_seed"] for r in rows} == {0, 1}
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/checkpoints/*"))
    assert "already" not in shown(results_csv=str(other)) and len(read_results(other)) == 2 * 3, "a table of its own is filled again"
    assert before == sorted(p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/checkpoints/*")), "and nothing is trained for it"


def test_two_pretrainings_are_one_mean_only_where_the_seed_is_all_that_differs(clips, tmp_path):
    "Through real runs: a network, a target and a probe's length are refused by name; two seeds are averaged."
    table = tmp_path / "results.csv"
    def probed(name, which="student", steps=2, run=None, **changed):
        config = AaSPConfig.preset("tiny", **{**TINY, "steps": 2, "warmup_steps": 1, "contrastive_weight": 0.1, **changed})
        folder = tmp_path / (run or name)
        if not folder.exists(): pretrain(config, clips, folder, device="cpu", workers=0, progress="none")
        _, record = run_probe(open_model(folder, which=which), clips, preset="us8k", steps=steps, seeds=(0, 1), cache=None, device="cpu")
        save_probe(record, tmp_path / f"probe {name}", table)
        return [r for r in load_results(table) if r["identity"] == record["identity"] and r["rule"] == "last_step"]
    first, second = probed("a"), probed("b", seed=1)
    s = summarise(first + second)
    assert (s["seeds"], s["probe_seeds"], s["kind"]) == (2, 2, "seeds")
    assert len(first) == len(second) == 2 and first[0]["identity"] != second[0]["identity"]
    assert summarise(first)["kind"] == "clips" and summarise(first)["seeds"] == 1
    for rows, name in ((probed("teacher", "teacher", run="b", seed=1), "pretraining.network"), (probed("c", seed=1, target="logmel"),
                       "pretraining.target"), (probed("d", steps=3, run="b", seed=1), "steps")):
        with pytest.raises(ResultsError, match=f"different.* {name} "): summarise(first + rows)
    norms = {json.loads((tmp_path / n / "config.json").read_text())["norm_mean"] for n in "ab"}
    assert len(norms) == 2, "statistics that were measured follow from the seed, and are no other experiment"


def test_table_5_comes_out_of_fine_tuning_rows(clips, tmp_path):
    "Arms of one scale, each fine-tuned from its checkpoint with two seeds, as `finetune.ipynb` records them."
    table, recipe = tmp_path / "results.csv", FinetuneConfig.preset("esc50", steps=1, batch_size=8, frames=64, evaluations=1)
    for arm in ("standard", "aape"):
        config = AaSPConfig.preset("tiny", **{**TINY, "contrastive_weight": 0.1, "patch_embed": arm})
        torch.manual_seed(0)
        start = open_model(save_encoder(build_encoder(config), config, tmp_path / arm))
        results = finetune_all((start.encoder, start.config), clips, tmp_path / f"ft {arm}", recipe, (0, 1), origin=start.origin,
                               device="cpu", cache=False, progress="none")
        record_results(results, table, dataset="ESC-50", model=arm, checkpoint=start.fingerprint, scale=start.scale)
    rows = load_results(table)
    lines = compare("V", rows, dataset="ESC-50", task="finetune", rule="last_step")
    assert [bool(l["ours"]) for l in lines] == [True, False, False, True, False, False]
    assert [(l["ours"]["seeds"], l["ours"]["probe_seeds"], l["ours"]["kind"]) for l in lines if l["ours"]] == [(1, 2, "clips")] * 2
    assert "standard w 0.1" in comparison_table("V", rows, rule="last_step")


def test_older_rows_are_read_as_what_they_were(tmp_path):
    "Files from before this: the seed of an ablation is its pre-training's, other rows are known by checkpoint, the arm leaves the scale."
    import aasp_nb
    example = load_results(Path(aasp_nb.__file__).parent / "assets" / "example_results.csv")
    for name, count in (("V", 6), ("VI", 2), ("VII", 3), ("VIII", 2)):
        lines = compare(name, example, rule="last_step")
        assert len(lines) == count and max(l["ours"]["seeds"] for l in lines if l["ours"]) == 3
    committed = load_results(RUNS.parent.parent / "figures" / "results_real_audio.csv")
    assert not [r["scale"] for r in committed if "aape" in r["scale"] or "standard" in r["scale"]]
    part = [r for r in committed if r["rule"] == "last_step" and r["task"] == "linear_probe"]
    groups = {}
    for r in part: groups.setdefault((r["dataset"], r["protocol"], r["checkpoint"], r["settings"].get("pooling")), []).append(r)
    for key, rows in groups.items():
        if key[2]: assert summarise(rows)["seeds"] == 1, key


@pytest.mark.parametrize("scored, found, shown", [
    (13, 22_176, None), (18_344, 22_176, None), (18_345, 22_176, "18,345 of 20,383 clips"), (20_383, 22_176, "20,383 of 20,383 clips"),
    (20_383, 19_000, None), (20_383, None, "20,383 of 20,383 clips")])
def test_audioset_is_official_within_a_stated_share(tmp_path, capsys, scored, found, shown):
    "Few clips, of the test or of the training, are no official score, and the cell says how many were scored."
    settings = dict(benchmark=dict(name="as20k", complete=False, **({"found": dict(train=found, test=scored)} if found else {})))
    append_results(tmp_path / "results.csv", [dict(
        dataset="AS-20K", task="finetune", protocol="paper/as20k", model="mine", checkpoint="abc", scale="s", seed=s, fold="",
        split="test", metric="mAP", rule="last_step", value=0.55, n=scored, settings=json.dumps(settings)) for s in (0, 1, 2)])
    run_cells("tables.ipynb", results_csv=str(tmp_path / "results.csv"), out=str(tmp_path))
    three, *_, other = (tmp_path / "tables.md").read_text().split("### ")[1:]
    assert ("55.0" in three, "55.0" in other) == (shown is not None, shown is None)
    assert shown is None or f"| 55.0 +- 0.0 ({shown}) |" in three
