"""Every run, dashboard and lesson notebook executes, headless, in the reduced setting of the table below.

Solutions of the lessons are folded away in the text (`<details>` with a python block); here each becomes a cell that runs
where it stands, so a solution that is wrong fails the test."""
import ast
import hashlib
import os
import re
import resource
from pathlib import Path

import nbformat
import papermill
import pytest

import aasp_nb
from aasp_nb.patch_embed import AaPE
from aasp_nb.config import AaSPConfig, build_encoder
from aasp_nb.encoders import checkpoint_path, load_encoder, save_encoder

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"

# Parameters of each notebook in its reduced setting; every notebook has a row. {out}, {clips}, {home}: fresh folders, the
# second with generated clips, the last the notebook's AASP_HOME.
TINY = dict(steps=2, batch_size=4, views=2)
REDUCED = {
    "runs/ablations.ipynb": dict(data="{clips}", labelled="{clips}", tables="VII", steps=2, probe_steps=5, keep_runs=False,
                                 overrides='{"batch_size": 4, "views": 2, "depth": 1, "embed_dim": 48}', device="cpu"),
    "runs/bench_data.ipynb": dict(clips=10, seconds=0.6, batch_size=4, rounds=1, workers="0", out_dir="{out}"),
    "runs/bench_sblu.ipynb": dict(batch=1, channels=8, frames=64, kernel_sizes="31", threads=1, rounds=1, seconds=0.2,
                                  compile_reference=False, out_dir="{out}"),
    "runs/bench_train.ipynb": dict(presets="nano", batch=2, views=2, threads=1, rounds=1, out_dir="{out}"),
    "runs/bench_training.ipynb": dict(preset="tiny", batch=2, views=2, threads=1, rounds=1, out_dir="{out}"),
    "runs/compare_runs.ipynb": dict(table="{home}/table.csv"),
    "runs/demo.ipynb": dict(out="{out}", per_class=6, probe_steps=20, seeds="0", threads=1, **TINY),
    "runs/figures.ipynb": dict(out_dir="{out}", preset="tiny"),
    "runs/finetune.ipynb": dict(data="{clips}", preset="esc50", frames="64", steps="2", batch_size="4", evaluations="1",
                                seeds="0", device="cpu", cache="False"),
    "runs/inspect.ipynb": dict(data="{clips}", preset="nano", max_clips=20, queries=1, seconds=1.0, out_dir="{out}"),
    "runs/linear_probe.ipynb": dict(data="{clips}", checkpoint="modulation", steps=20, seeds="0"),
    "runs/pretrain.ipynb": dict(data="{clips}", depth=1, warmup_steps=1, device="cpu", cache="False", **TINY),
    "runs/reproduce.ipynb": dict(run=True, tables="VI,IV", max_cells=4, device="cpu", out="{out}"),
    "runs/stability.ipynb": dict(data="{clips}", models="logmel", seconds=0.3, kinds="cropped", table="{home}/table.csv"),
    "runs/study.ipynb": dict(data="{clips}", arms="standard,aape", pretrain_seeds="0", preset="nano", overrides="", steps=2, probe_steps=5,
                             device="cpu", work="{out}"),
    "runs/tables.ipynb": dict(out="{out}"),
    "runs/train_demo_checkpoint.ipynb": dict(out="{out}", work="{home}", per_class=2, seconds=2.1, **TINY),
    "dashboards/ablations.ipynb": dict(picture="{home}/a.png"),
    "dashboards/alias_lab.ipynb": dict(picture="{home}/a.png"),
    "dashboards/patch_parameters.ipynb": dict(picture="{home}/a.png"),
    "dashboards/windows.ipynb": dict(picture="{home}/a.png"),
    "lessons/01_aliasing.ipynb": dict(),
    "lessons/02_windows_and_gradients.ipynb": dict(),
    "lessons/03_sblu_by_hand.ipynb": dict(),
    "lessons/04_inside_aape.ipynb": dict(),
    "lessons/05_pretraining_in_five_minutes.ipynb": dict(steps=6),
}
# Every notebook runs here in `make test`, but those that another test runs there, named; --full runs these here too.
BY_OTHERS = {"runs/figures.ipynb": "test_guides.py", "runs/finetune.ipynb": "test_finetuning.py",
             "runs/linear_probe.ipynb": "test_probing.py", "runs/pretrain.ipynb": "test_training.py",
             "runs/stability.ipynb": "test_robustness.py",
             "dashboards/ablations.ipynb": "test_dashboards.py", "dashboards/windows.ipynb": "test_dashboards.py"}
SECONDS = 120  # processor time of a lesson with its solutions; lessons are meant for 60 s on two idle cores

FOLDERS = ("runs", "dashboards", "lessons")
GUIDES = sorted(str(p.relative_to(NBS)) for f in FOLDERS for p in (NBS / f).glob("*.ipynb"))
LESSONS = [g for g in GUIDES if g.startswith("lessons/")]
SOLUTION = re.compile(r"<details>.*?</details>", re.S)
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def solutions(text: str) -> list[str]:
    "Code blocks inside the folded parts of a markdown cell."
    return [code for part in SOLUTION.findall(text) for code in BLOCK.findall(part)]


def asked_again(exercise: str) -> str:
    "The cell of an exercise without what the learner replaces: names set to None and functions whose body is `...`."
    empty = lambda node: isinstance(node, ast.Constant) and node.value in (None, ...)
    left = lambda n: (isinstance(n, ast.Assign) and (empty(n.value) or isinstance(n.value, ast.Tuple) and all(map(empty, n.value.elts)))
                      or isinstance(n, ast.FunctionDef) and isinstance(n.body[-1], ast.Expr) and empty(n.body[-1].value))
    return "\n".join(ast.unparse(n) for n in ast.parse(exercise).body if not left(n))


def with_solutions(source: Path, target: Path) -> int:
    "Copy a notebook, each folded solution as a code cell after its text; the number of solutions."
    nb, cells, count = nbformat.read(source, 4), [], 0
    for cell in nb.cells:
        cells.append(cell)
        if cell.cell_type != "markdown": continue
        for code in solutions(cell.source):
            cells.append(nbformat.v4.new_code_cell(code + "\n" + asked_again(cells[-2].source), metadata={"solution": True}))
            count += 1
    nb.cells = cells
    nbformat.write(nb, target)
    return count


def prepare(name: str, home: Path) -> None:
    "What a notebook reads that other notebooks write: two short runs, a table of results."
    from aasp_nb.clips import write_clips
    write_clips(home / "sounds", per_class=6, seed=0, seconds=0.5)
    if name in ("runs/compare_runs.ipynb", "runs/tables.ipynb"):
        from aasp_nb.config import AaSPConfig
        from aasp_nb.pretraining import pretrain
        for i, lr in enumerate((1e-3, 2e-3) if "compare" in name else ()):
            small = AaSPConfig.preset("tiny", depth=1, warmup_steps=1, crop_seconds=0.5, n_frames=None, lr=lr, **TINY)
            pretrain(small, home / "sounds", home / "runs" / f"run{i}", device="cpu", workers=0, log_every=1, progress="none")


def execute(name: str, tmp: Path, **parameters) -> tuple[nbformat.NotebookNode, float]:
    "Run a notebook from an unrelated folder, its own AASP_HOME; the executed notebook and its processor time in seconds."
    home, source, before = tmp / "home", tmp / "source.ipynb", os.environ.get("AASP_HOME")
    places = {"{out}": str(tmp / "out"), "{clips}": str(home / "sounds"), "{home}": str(home)}
    fill = lambda v: re.sub(r"\{(out|clips|home)\}", lambda m: places[m[0]], v) if isinstance(v, str) else v
    values = {k: fill(v) for k, v in {**REDUCED[name], **parameters}.items()}
    home.mkdir()
    with_solutions(NBS / name, source)
    os.environ["AASP_HOME"] = str(home)
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start = spent()
    try:
        if name.startswith("runs/") and name != "runs/figures.ipynb": prepare(name, home)
        done = papermill.execute_notebook(source, tmp / "done.ipynb", values, cwd=tmp, progress_bar=False,
                                          kernel_name="python3", store_widget_state=False)
    finally:
        if before is None: del os.environ["AASP_HOME"]
        else: os.environ["AASP_HOME"] = before
    return done, spent() - start


def outputs(nb) -> list:
    return [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]


@pytest.mark.parametrize("name", GUIDES)
def test_notebook_executes(name, tmp_path, request):
    if name in BY_OTHERS and not request.config.getoption("--full"):
        pytest.skip(f"SKIPPED: {name} runs in {BY_OTHERS[name]}, and here with --full (make test-full)")
    nb, seconds = execute(name, tmp_path)
    print(f"{name}: {seconds:.0f} s of processor time")
    assert not [o for o in outputs(nb) if o.output_type == "error"]
    assert (tmp_path / "done.ipynb").stat().st_size < 2_000_000, "an executed notebook must stay under 2 MB"
    if name.startswith("lessons/"):
        assert 0 < seconds < SECONDS
        said = ["".join(o.get("text", "") for o in c.outputs) for c in nb.cells if c.metadata.get("solution")]
        assert said and all("right!" in s and "not yet" not in s for s in said), said
    if "picture" in REDUCED[name]: assert (tmp_path / "home" / "a.png").stat().st_size > 10_000


def test_every_notebook_is_named():
    "No notebook of the three kinds is left out, and none is named that does not exist."
    assert sorted(REDUCED) == GUIDES and {*BY_OTHERS} <= {*REDUCED}
    for name, test in BY_OTHERS.items():
        assert Path(name).stem in (ROOT / "tests" / test).read_text(encoding="utf-8"), f"{test} does not mention {name}"


@pytest.mark.parametrize("name", LESSONS)
def test_lesson_keeps_its_promises(name):
    nb = nbformat.read(NBS / name, 4)
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    first = next(c.source for c in nb.cells if c.cell_type == "markdown")
    assert re.search(r"rates.*not\s+(>\s+)?(of\s+|about\s+)?audio", first, re.S | re.I), "the first lines say what this is not about"
    assert text.lower().count("predict") >= 3, "predict first, then reveal"
    folded = [code for c in nb.cells if c.cell_type == "markdown" for code in solutions(c.source)]
    assert len(folded) >= 2 and all("assert" in code for code in folded), "exercises with solutions that check themselves"
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
    assert "player(" in code and "autoplay=True" not in code, "sound to play, never by itself"
    links = re.findall(r"\]\(([^)#]+?\.ipynb)", text)
    assert links and not [target for target in links if not (NBS / name).parent.joinpath(target).exists()]
    tags = [t for c in nb.cells for t in c.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and re.search(r"^clip = ", code, re.M)


@pytest.mark.parametrize("kind, fields", (("standard", dict(patch_embed="standard")), ("non-adaptive", dict(adaptive=False))))
def test_figure_4_refuses_a_run_that_estimates_nothing(kind, fields, tmp_path):
    "A checkpoint that is named is drawn or refused, never replaced by an untrained model."
    config = AaSPConfig.preset("tiny", depth=1, **fields)
    save_encoder(build_encoder(config), config, tmp_path / "run")
    nb = nbformat.read(ROOT / "nbs" / "runs" / "figures.ipynb", 4)
    cell = next(c.source for c in nb.cells if "Figure 4 needs a run" in c.source)
    head = cell[:cell.index("embed4, origin =")]
    scope = dict(checkpoint=str(tmp_path / "run"), Path=Path, load_encoder=load_encoder, checkpoint_path=checkpoint_path, AaPE=AaPE, aasp_nb=aasp_nb)
    with pytest.raises(ValueError, match=f"{kind} patch embedding"): exec(head, scope)


def test_figures_are_the_same_bytes_again(tmp_path):
    "Two runs of the figures notebook with one seed write the same bytes, each with its caption."
    made = []
    for i in range(2):
        folder = tmp_path / str(i); folder.mkdir()
        execute("runs/figures.ipynb", folder)
        made.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "out").iterdir())})
    assert made[0] == made[1] and len(made[0]) >= 15
    text = (tmp_path / "0" / "out" / "captions.md").read_text(encoding="utf-8")
    for name in made[0]:
        assert name in text or name == "captions.md", f"{name} has no caption"


def test_committed_figures_have_captions():
    text = (ROOT / "figures" / "captions.md").read_text(encoding="utf-8")
    for number in (1, 2, 3, 4): assert f"In the paper: Figure {number}" in text
    for target in re.findall(r"`([\w]+\.(?:svg|png))`", text): assert (ROOT / "figures" / target).exists(), target
    for svg in (ROOT / "figures").glob("*.svg"):
        source = svg.read_text(encoding="utf-8")
        assert "<dc:date>" not in source
        if svg.stem in text: assert "<text" not in source, f"{svg.name} depends on installed fonts"
