"""Shards under damage: kills, full disks, cut tars, paths that leave; the order of files, in any number of processes."""
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import aasp_nb.shards
from aasp_nb.clips import write_clips
from aasp_nb.data import AudioDataset, Manifest, ManifestError, decode_once, eval_loader, train_loader
from aasp_nb.shards import damaged_tars, index_tars, make_shards, read_tar


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Thirty generated clips of 0.3 s with their manifest."
    return write_clips(tmp_path_factory.mktemp("clips"), per_class=3, seed=0, seconds=0.3)


@pytest.fixture(scope="module")
def shards(clips, tmp_path_factory):
    "The same in tars of seven."
    out = tmp_path_factory.mktemp("shards")
    make_shards(clips, out, clips_per_shard=7, progress=lambda line: None)
    return out


def tars(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).glob("*.tar"))}


def batches(data, workers=0, start=0, stop=7, **kw):
    return list(train_loader(AudioDataset(data, 0.5, fill_crops=True, seed=2), 6, seed=3, start=start, stop=stop, workers=workers, **kw))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)


def test_shards_and_files_give_the_same_batches(clips, shards):
    whole = batches(clips)
    assert same(whole, batches(shards)) and same(whole, batches(shards, workers=2)) and same(whole[4:], batches(shards, start=4))
    labels = Manifest.open(shards).targets()
    assert labels.tolist() == Manifest.open(clips).targets().tolist()
    out = [list(eval_loader(AudioDataset(d, 0.4, train=False, labels=labels), 8)) for d in (clips, shards)]
    assert same(*out)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_order_does_not_depend_on_the_number_of_processes(shards, world):
    "Elastic: a run of one process is resumed at step 3 by `world` processes."
    whole = batches(shards)
    parts = [batches(shards, start=3, rank=r, world=world) for r in range(world)]
    for step, batch in enumerate(whole[3:]):
        together = torch.cat([p[step]["wave"] for p in parts])
        order = torch.cat([p[step]["index"] for p in parts])
        want = {int(i): w for i, w in zip(batch["index"], batch["wave"])}
        assert sorted(want) == sorted(order.tolist()) and all(torch.equal(want[int(i)], w) for i, w in zip(order, together))


def test_selected_rows_and_caches_of_shards(shards, clips, tmp_path):
    m, f = Manifest.open(shards), Manifest.open(clips)
    label = m.values("label")[3]
    assert m.select(label=label).columns["path"] == f.select(label=label).columns["path"]
    assert m.select(label=label).file(1).read() == f.select(label=label).file(1).read_bytes()
    again = Manifest.open(m.to_csv(shards / "copy.csv"))
    (shards / "copy.csv").unlink()
    assert again.columns == m.columns and again.file(5).read() == m.file(5).read()
    cache = decode_once(m, folder=tmp_path)
    assert (cache.read(9) - AudioDataset(clips, 0.3).reader.read(9)).abs().max() < 1e-4


def slow_writer(clips, out, pause):
    "What a process that will be killed does."
    add = aasp_nb.shards._add
    def slow(*a): time.sleep(pause); return add(*a)
    aasp_nb.shards._add = slow
    make_shards(clips, out, clips_per_shard=7, workers=1, progress=lambda line: None)


def alone(function, *a):
    "The pool of PyTorch's threads is made anew in a fork; two threads that both come first find none, so it is made here."
    torch.set_num_threads(1)
    function(*a)


def start(function, *a):
    "A process of its own, without importing everything again."
    process = multiprocessing.get_context("fork").Process(target=alone, args=(function, *a))
    process.start()
    return process


def test_a_killed_writer_goes_on_to_the_same_bytes(clips, shards, tmp_path):
    for k, part in enumerate((".shard-000000.*.tar", "shard-000001.tar")):
        out = tmp_path / f"out{k}"
        worker, end = start(slow_writer, clips, out, 0.004), time.monotonic() + 60
        while not list(out.glob(part)) and worker.is_alive() and time.monotonic() < end: time.sleep(0.001)
        worker.kill(), worker.join(60)
        assert worker.exitcode == -signal.SIGKILL
        if list(out.glob("*.tar")):
            with pytest.raises(ManifestError, match="aasp shards"): Manifest.open(out)
        kept = {p.name: p.stat().st_mtime_ns for p in sorted(out.glob("*.tar"))}
        make_shards(clips, out, clips_per_shard=7, progress=lambda line: None)
        assert tars(out) == tars(shards) and not list(out.glob(".shard-*"))
        assert all((out / n).stat().st_mtime_ns == t for n, t in list(kept.items())[:-1])
        assert same(batches(out, stop=2), batches(clips, stop=2))


def test_a_changed_clip_changes_only_its_tar(clips, tmp_path):
    home = tmp_path / "clips"
    shutil.copytree(clips if Path(clips).is_dir() else Path(clips).parent, home)
    make_shards(home, tmp_path / "out", clips_per_shard=7, progress=lambda line: None)
    before = tars(tmp_path / "out")
    (tmp_path / "out" / "shards.json").unlink()  # unfinished
    sf.write(Manifest.open(home).file(8), np.zeros(3000), 16000)
    make_shards(home, tmp_path / "out", clips_per_shard=7, progress=lambda line: None)
    after = tars(tmp_path / "out")
    assert [n for n in before if before[n] != after[n]] == ["shard-000001.tar"] and not damaged_tars(tmp_path / "out")


def test_two_writers_are_kept_apart(clips, tmp_path):
    worker, end = start(slow_writer, clips, tmp_path / "out", 0.2), time.monotonic() + 60
    try:
        while not list((tmp_path / "out").glob(".shard*")) and time.monotonic() < end: time.sleep(0.01)
        with pytest.raises(ManifestError, match="another process"): make_shards(clips, tmp_path / "out")
    finally: worker.kill(), worker.join(60)


def limited(clips, out, limit, what, told):
    "Work under a limit on the size of a file; the error's text goes to a file opened before."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        if what == "cache": decode_once(Manifest.open(clips), folder=out)
        else: make_shards(clips, out, clips_per_shard=7, progress=lambda line: None)
    except ManifestError as e:
        told.write_text(str(e))
        os._exit(3)


@pytest.mark.parametrize("what,says", [("shards", "run the same command again"), ("cache", "AASP_HOME")])
def test_a_full_disk_is_said_clearly_and_leaves_nothing_half(clips, tmp_path, what, says):
    "A limit on the size of a file stands in for a full disk: the write fails in the middle in the same way."
    def run(limit):
        process = start(limited, clips, tmp_path / "out", limit, what, tmp_path / "told")
        process.join(120)
        return process.exitcode
    assert run(40_000) == 3
    assert says in (tmp_path / "told").read_text() and "is full" in (tmp_path / "told").read_text()
    assert not list((tmp_path / "out").glob("*.tar")) and not list((tmp_path / "out").glob("[!.]*"))
    assert run(10**9) == 0
    if what == "shards": assert same(batches(tmp_path / "out", stop=2), batches(clips, stop=2))


def test_too_little_space_is_refused_before_work(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ManifestError, match="GB are free"): make_shards(clips, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_clips_are_counted_as_in_files(tmp_path):
    home = Manifest.open(write_clips(tmp_path / "clips", per_class=2, seed=0, seconds=0.3))
    home.file(4).write_text("no audio")
    make_shards(home, tmp_path / "out", clips_per_shard=6, progress=lambda line: None)
    make_shards(home, tmp_path / "flac", sr=16000, progress=lambda line: None)
    for data in (home, tmp_path / "out", tmp_path / "flac"):
        dataset = AudioDataset(data, 0.3, max_broken=2)
        with pytest.warns(UserWarning, match="broken clip"): seen = [int(i) for b in train_loader(dataset, 5, stop=4) for i in b["index"]]
        assert sorted(dataset.broken.seen) == [4] and 4 not in seen and len(seen) == 20
    with pytest.raises(ManifestError, match="closed|empty|missing"):
        home.file(5).write_bytes(b"")
        make_shards(home, tmp_path / "other")


def test_damaged_shards_give_an_error_of_ours_or_the_right_clips(clips, shards, tmp_path):
    "Mutations of the index and of the tars."
    want, rng, fine = Manifest.open(clips), random.Random(0), 0
    for k in range(60):
        out = tmp_path / str(k)
        shutil.copytree(shards, out)
        file = rng.choice(sorted(p for p in out.rglob("*") if p.is_file() and ".notes" not in p.parts))
        data = bytearray(file.read_bytes())
        at = rng.randrange(len(data))
        if rng.random() < 0.4: del data[at:at + rng.randint(1, 2000)]
        elif rng.random() < 0.5: data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 30)))
        else: data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(data))
        try: m, bad = Manifest.open(out), damaged_tars(out)
        except ManifestError: pass
        else:
            assert len(m) == len(want)
            if file.suffix == ".tar": assert bad == [file.name]
            fine += 1
        if file.suffix == ".tar" and file.stat().st_size < (shards / file.name).stat().st_size:
            with pytest.raises(ManifestError, match="truncated|missing|damaged"): Manifest.open(out)
            try: read_tar(file)
            except ManifestError: pass
        shutil.rmtree(out)
    assert fine > 2


def test_paths_that_leave_are_refused(shards, tmp_path):
    for key, value in (("tars", "../x.tar"), ("tars", "/etc/passwd"), ("tars", "a/../../x.tar")):
        out = tmp_path / "out"
        shutil.copytree(shards, out, dirs_exist_ok=True)
        index = json.loads((out / "shards.json").read_text())
        index[key][0]["name"] = value
        (out / "shards.json").write_text(json.dumps(index))
        with pytest.raises(ManifestError, match="leaves"): Manifest.open(out)
    (tmp_path / "m.csv").write_text("path,shard\na.wav,../../etc/passwd@0:10\n")
    with pytest.raises(ManifestError, match="no place in a tar"): AudioDataset(tmp_path / "m.csv", 0.5)[0]


def test_tars_from_elsewhere(clips, tmp_path):
    m = Manifest.open(clips)
    with tarfile.open(tmp_path / "web-0.tar", "w") as t:
        for i in range(5): t.add(m.file(i), f"{i:04d}.wav")
    assert same(list(eval_loader(AudioDataset(index_tars(tmp_path), 0.3, train=False), 5)),
                list(eval_loader(AudioDataset(m.take(range(5)), 0.3, train=False), 5)))


SCALE = """
import hashlib, json, os, sys, time
begin = time.monotonic()
from aasp_nb.data import AudioDataset, train_loader
imported = time.monotonic()
dataset = AudioDataset(sys.argv[1], 0.05, seed=1)
start, stop, workers = map(int, sys.argv[2:5])
memory = lambda: int(next(l for l in open("/proc/self/smaps_rollup") if l.startswith("Pss:")).split()[1]) / 1024
loader, seen, first, grown = train_loader(dataset, 250, seed=1, start=start, stop=stop, workers=workers), {}, None, []
for step, batch in enumerate(loader, start):
    first = first or time.monotonic() - imported
    seen[step] = hashlib.sha256(batch["wave"].numpy().tobytes()).hexdigest()
    if step % 40 == 20: grown.append(memory())
print(json.dumps(dict(seen=seen, start_up=first, imports=imported - begin, memory=grown, seconds=time.monotonic() - imported,
                      cpu=time.process_time())))
"""


@pytest.mark.slow
def test_a_hundred_thousand_clips(tmp_path):
    "Constant memory, a start within seconds, an exact resume at a random position."
    n, rng = int(os.environ.get("AASP_SCALE_CLIPS", 100_000)), np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    sf.write(tmp_path / "one.wav", (rng.standard_normal(800) * 3000).astype(np.int16), 16000)
    head, rest = (tmp_path / "one.wav").read_bytes()[:-8], ["path,label"]
    for i in range(n):
        if i % 1000 == 0: (tmp_path / "clips" / f"{i // 1000:03d}").mkdir()
        rest.append(f"{i // 1000:03d}/{i:06d}.wav,c{i % 7}")
        with open(f"{tmp_path}/clips/{i // 1000:03d}/{i:06d}.wav", "wb") as f:
            f.write(head + np.array([i % 30000, i // 30000, 0, 0], np.int16).tobytes())  # every clip ends differently
    (tmp_path / "clips" / "manifest.csv").write_text("\n".join(rest) + "\n")
    begin, used = time.monotonic(), time.process_time()
    shards = make_shards(tmp_path / "clips", tmp_path / "shards", clips_per_shard=2000)
    made, used = time.monotonic() - begin, time.process_time() - used
    assert len(shards) == n and not damaged_tars(tmp_path / "shards")
    def run(*a):
        done = subprocess.run([sys.executable, "-c", SCALE, *map(str, a)], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)
    steps = n // 250
    whole = run(tmp_path / "shards", 0, steps, 0)
    start = random.randrange(10, steps - 10)
    part = run(tmp_path / "shards", start, start + 10, 1)
    files = run(tmp_path / "clips", start, start + 3, 0)
    print(f"\n{n} clips: written in {made:.0f} s ({used:.0f} s of processor); first batch {whole['start_up']:.2f} s after the imports "
          f"({whole['imports']:.1f} s) from shards, {files['start_up']:.2f} s from files; memory over an epoch {min(whole['memory']):.0f} to {max(whole['memory']):.0f} MiB; "
          f"epoch of {steps} batches {whole['seconds']:.0f} s ({whole['cpu']:.0f} s of processor); resumed at step {start}")
    assert len(whole["seen"]) == steps and len(set(whole["seen"].values())) == steps
    assert all(whole["seen"][k] == v for k, v in (part["seen"] | files["seen"]).items()) and len(part["seen"]) == 10
    assert whole["start_up"] < 10 and max(whole["memory"]) - whole["memory"][0] < 20
