"""Benchmarks at their full size, with files of one byte; results written by several processes at once."""
import multiprocessing

import pytest

from aasp_nb.benchmarks import BENCHMARKS, BenchmarkError, append_results, load_benchmark, read_results


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def esc50(root):
    rows = [(f"{fold}-{1000 * fold + i // 2}-{'AB'[i % 2]}-{i % 50}.wav", fold, f"class{i % 50:02d}", f"{fold}{i // 2}")
            for fold in range(1, 6) for i in range(400)]
    for name, *_ in rows: put(root / "audio" / name)
    (root / "meta").mkdir()
    (root / "meta" / "esc50.csv").write_text("filename,fold,target,category,esc10,src_file,take\n" + "".join(
        f"{n},{f},0,{c},False,{s},A\n" for n, f, c, s in rows))


def us8k(root):
    rows = [(f"{i}-{i % 10}-0-0.wav", i, i % 10 + 1, f"class{(i // 10) % 10}") for i in range(8732)]
    for n, _, f, _ in rows: put(root / "audio" / f"fold{f}" / n)
    (root / "metadata").mkdir()
    (root / "metadata" / "UrbanSound8K.csv").write_text(
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n" + "".join(f"{n},{i},0,4,1,{f},0,{c}\n" for n, i, f, c in rows))


def cremad(root):
    split = ["train"] * 5155 + ["valid"] * 732 + ["test"] * 1551
    for i in range(len(split)): put(root / "AudioWAV" / f"{i}.wav")
    (root / "cremad.csv").write_text("file_name,label,speaker_id,split\n" + "".join(
        f"{i}.wav,emotion{i % 6},{s}{i % 50},{s}\n" for i, s in enumerate(split)))


@pytest.mark.parametrize("name,make", [("esc50", esc50), ("us8k", us8k), ("cremad", cremad)])
def test_complete_benchmark_is_complete(tmp_path, name, make):
    make(tmp_path)
    manifest, report = load_benchmark(name, tmp_path)
    assert report.complete, str(report)
    assert len(manifest) == sum(BENCHMARKS[name].counts.values()) and len(report.classes) == BENCHMARKS[name].n_classes
    manifest.file(7).unlink()
    with pytest.raises(BenchmarkError, match="missing or empty"): load_benchmark(name, tmp_path)
    _, report = load_benchmark(name, tmp_path, allow_missing=True)
    assert not report.complete and len(report.missing) == 1


def append_many(table, worker):
    "What one of several processes does."
    for _ in range(20):
        rows = [dict(seed=s, value=.5, n=1, metric="accuracy", dataset=str(worker) * 200) for s in range(5)]
        append_results(table, rows, revision="r")


def test_results_of_many_processes_keep_whole_rows(tmp_path):
    table = tmp_path / "sub" / "results.csv"
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=append_many, args=(table, w)) for w in range(3)]
    for w in workers: w.start()
    for w in workers: w.join(120)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    rows = read_results(table)
    assert len(rows) == 300 and {r["dataset"] for r in rows} == {str(w) * 200 for w in range(3)}
