"""Data across process borders and under damage: order, crops, caches, manifests."""
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from aasp_nb.audio import AudioError, LogMel
from aasp_nb.clips import write_clips
from aasp_nb.data import (AudioDataset, CachedReader, Manifest, ManifestError, StepSampler, dataset_statistics, decode_once,
                          eval_loader, train_loader)


def batches(clips, workers=0, start=0, stop=9, **kw):
    dataset = AudioDataset(clips, seconds=1.0, fill_crops=True, **kw)
    return list(train_loader(dataset, 6, seed=3, start=start, stop=stop, workers=workers))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)


def test_order_and_crops_do_not_depend_on_workers_or_start(clips):
    whole = batches(clips)
    assert same(whole, batches(clips, workers=1)) and same(whole, batches(clips, workers=2))
    for start in (1, 3, 8):
        assert same(whole[start:], batches(clips, workers=start % 2, start=start))
    assert not torch.equal(whole[0]["wave"], batches(clips, seed=1)[0]["wave"])


def test_another_process_makes_the_same_crops(clips):
    code = ("import sys, hashlib; from aasp_nb.data import *; d = AudioDataset(sys.argv[1], 1.0, fill_crops=True, seed=4);"
            "print(hashlib.sha256(b''.join(d[i, 2]['wave'].numpy().tobytes() for i in range(9))).hexdigest())")
    run = lambda hashseed: subprocess.run([sys.executable, "-c", code, str(clips)], capture_output=True, text=True, check=True,
                                          env={**os.environ, "PYTHONHASHSEED": hashseed}, cwd="/").stdout
    assert len(run("1")) == 65 and run("1") == run("2")


def test_every_clip_is_seen_once_per_epoch():
    for n, size in ((17, 5), (20, 5), (3, 3), (7, 1)):
        sampler = StepSampler(n, size, seed=1)
        for epoch in range(3):
            seen = [i for s in range(sampler.batches) for i, e in sampler.batch(epoch * sampler.batches + s) if e == epoch]
            assert len(seen) == len(set(seen)) == n // size * size


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_a_batch_without_overlap(world):
    whole = [StepSampler(40, 6, seed=2).batch(s) for s in range(12)]
    parts = [[StepSampler(40, 6, seed=2, rank=r, world=world).batch(s) for r in range(world)] for s in range(12)]
    for a, b in zip(whole, parts):
        assert sorted(a) == sorted(k for part in b for k in part) and {len(p) for p in b} == {6 // world}


def test_cache_gives_the_same_clips_and_is_made_anew_for_changed_files(clips, tmp_path):
    manifest = Manifest.open(clips)
    cache = decode_once(manifest, folder=tmp_path)
    a, b = batches(clips), batches(clips, reader=cache)
    for x, y in zip(a, b):
        assert torch.equal(x["index"], y["index"]) and (x["wave"] - y["wave"]).abs().max() < 1e-4
    file = manifest.file(0)
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 10**9))
    decode_once(manifest, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_remembers_broken_clips(tmp_path):
    path = write_clips(tmp_path / "c", per_class=1, seed=0, seconds=0.3)
    manifest = Manifest.open(path)
    manifest.file(4).write_text("no audio")
    manifest.file(5).unlink()
    cache = decode_once(manifest, folder=tmp_path / "cache")
    assert sorted(cache.broken) == [4, 5]
    again = CachedReader(next((tmp_path / "cache").iterdir()))
    with pytest.raises(AudioError): again.read(4)
    dataset = AudioDataset(manifest, 0.3, reader=again, max_broken=3)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        seen = torch.cat([b["index"] for b in train_loader(dataset, 5, stop=4, workers=2)])
    assert len([x for x in w if "broken clip" in str(x.message)]) == 2 == len(dataset.broken.seen)
    assert not {4, 5} & set(seen.tolist()) and len(seen) == 20


def test_too_many_broken_clips_stop_the_run_from_a_worker_too(tmp_path):
    manifest = Manifest.open(write_clips(tmp_path / "c", per_class=1, seed=0, seconds=0.3))
    for i in range(5): manifest.file(i).write_bytes(b"")
    for workers in (0, 2):
        with warnings.catch_warnings(), pytest.raises(AudioError, match="max_broken"):
            warnings.simplefilter("ignore")
            list(train_loader(AudioDataset(manifest, 0.3), 5, stop=4, workers=workers))


def test_evaluation_keeps_the_order_and_every_clip(clips):
    dataset = AudioDataset(clips, 0.5, train=False, labels=Manifest.open(clips).targets())
    out = list(eval_loader(dataset, 7, workers=1))
    assert torch.cat([b["index"] for b in out]).tolist() == list(range(20))
    assert torch.cat([b["label"] for b in out]).tolist() == dataset.labels.tolist()


def test_statistics_do_not_depend_on_batches_and_ignore_padding(clips):
    logmel = LogMel()
    tight, loose = (AudioDataset(clips, s, train=False) for s in (0.6, 3.0))
    a, b, c = dataset_statistics(tight, logmel, batch_size=3), dataset_statistics(tight, logmel), dataset_statistics(loose, logmel)
    assert np.allclose(a, b, atol=1e-4)
    assert np.allclose(a, c, atol=0.1)  # the last frames see silence instead of a mirror image


def test_links_out_of_the_root_by_path_are_refused(tmp_path):
    for path in ("../secret.wav", "a/../../b.wav", "/etc/hostname", "a\0b.wav", ""):
        (tmp_path / "m.csv").write_text(f"path,label\nx.wav,1\n{path},1\n")
        with pytest.raises(ManifestError): Manifest.from_csv(tmp_path / "m.csv")


def test_damaged_manifests_give_a_manifest_or_a_manifest_error(tmp_path):
    good = ("path,label,split\n" + "".join(f"a/{i}.wav,c{i % 3};x,train\n" for i in range(6))).encode()
    rng, path, fine = random.Random(0), tmp_path / "m.csv", 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at, kind = rng.randrange(len(data)), rng.random()
            if kind < 0.5: data[at] = rng.choice(b'",;\n\r\0\xff\x80/.. a')
            elif kind < 0.75: del data[at:at + rng.randint(1, 20)]
            else: data[at:at] = rng.choice([b'"', b"\n", b",", b"../", b"\xff", b"\xef\xbb\xbf"])
            if not data: break
        path.write_bytes(bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: m = Manifest.from_csv(path)
            except ManifestError: continue
        fine += 1
        assert len(m) and all(Path(os.path.normpath(m.file(i))).is_relative_to(tmp_path) for i in range(len(m)))
    assert fine > 20


@pytest.mark.data
def test_real_audio_gives_full_crops(real_data):
    found = sorted(real_data.rglob("manifest.csv"))
    manifest = Manifest.open(found[0] if found else real_data)
    batch = next(iter(train_loader(AudioDataset(manifest, 2.0, fill_crops=True), 8)))
    assert batch["wave"].isfinite().all() and (batch["valid_samples"] == 32000).all()


def test_segments_of_a_file_stay_on_one_side(tmp_path):
    from aasp_nb.finetuning import split_clips
    from aasp_nb.probing import probe_data
    n = 24
    m = Manifest(tmp_path, {"path": [f"{i // 4}.wav" for i in range(n)], "start": [i % 4 for i in range(n)],
                            "end": [i % 4 + 1 for i in range(n)], "label": ["a", "b"] * (n // 2),
                            "split": ["train"] * 20 + ["test"] * 4})
    for seed in range(5):
        parts = split_clips(m, validation=0.3, seed=seed)
        files = lambda rows: {m.columns["path"][i] for i in rows}
        assert files(parts.train) and files(parts.valid) and not files(parts.train) & files(parts.valid)
    assert probe_data(m, np.zeros((n, 2), np.float32)).group == m.columns["path"]
    fold = m.with_folds(3).columns["fold"]
    assert all(len({fold[i] for i in range(n) if m.columns["path"][i] == p}) == 1 for p in m.values("path"))
