"""Damaged files: every reader gives what was written or one of our errors, never a crash or a hang."""
import json
import random
import shutil
import signal
import warnings

import numpy as np
import pytest
import soundfile as sf
import torch

from aasp_nb import runs
from aasp_nb.audio import AudioError, audio_info, load_audio
from aasp_nb.clips import generate_clip
from aasp_nb.data import Manifest, ManifestError, decode_once
from aasp_nb.config import AaSPConfig, build_encoder
from aasp_nb.settings import ConfigError
from aasp_nb.encoders import load_encoder, save_encoder
from aasp_nb.runs import CheckpointError, latest_checkpoint, load_checkpoint, read_metrics, save_checkpoint

COUNTS = dict(checkpoint=900, resealed=300, encoder=150, manifest=900, audio=300, metrics=150, cache=100)
TINY = dict(embed_dim=16, depth=1, num_heads=1, sblu_hidden=1, sblu_dim=4, lambda_dim=4, views=2, predictor_dim=16, predictor_depth=1,
            predictor_heads=2, crop_seconds=1.0)


def test_enough_mutations(): assert COUNTS["checkpoint"] + COUNTS["resealed"] + COUNTS["manifest"] >= 2000


@pytest.fixture(autouse=True)
def no_hang():
    "One test of this page may take a minute, whatever it reads."
    def late(*a): raise TimeoutError("a reader hangs")
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(90)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def mutate(rng, data: bytes, spice=()) -> bytes:
    "One to four changes: bits, runs of bytes, cuts, insertions, repetitions."
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
        if kind == 0 and at < len(data): data[at] ^= 1 << rng.randrange(8)
        elif kind == 1: data[at:at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2: del data[at:at + rng.randint(1, max(1, len(data) // 4))]
        elif kind == 3: del data[at:]
        elif kind == 4: data[at:at] = rng.choice(spice) if spice else rng.randbytes(rng.randint(1, 40))
        elif kind == 5: data[at:at] = data[:rng.randint(0, 64)]
        else: data[at:at + 8] = bytes([rng.choice([0, 255])] * 8)
    return bytes(data)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[f][k]) for f in a for k, v in a[f].items())


@pytest.fixture
def checkpoint(tmp_path):
    "A small checkpoint with three files."
    g = torch.Generator().manual_seed(0)
    tensors = dict(model={f"student.{i}": torch.randn(3, 4, generator=g) for i in range(4)},
                   optimizer={"exp_avg/w": torch.randn(5, generator=g)}, rng=dict(cpu=torch.arange(8, dtype=torch.uint8)))
    return save_checkpoint(tmp_path / "checkpoints" / "step-00000004", tensors, dict(step=4, config={}, seconds=1.5))


def test_checkpoints(checkpoint):
    rng, refused = random.Random(0), 0
    tensors, state = load_checkpoint(checkpoint)
    files = sorted(checkpoint.iterdir())
    for n in range(COUNTS["checkpoint"]):
        file = rng.choice(files)
        good = file.read_bytes()
        kind = rng.random()
        if kind < 0.04: file.unlink()
        elif kind < 0.08: file.write_bytes(rng.choice(files).read_bytes())
        elif kind < 0.1: file.unlink(); file.mkdir()
        else: file.write_bytes(mutate(rng, good, (b"{", b"]", b'"', b"1e999", b"[" * 3000, b"null")))
        try:
            again, found = load_checkpoint(checkpoint)
            assert same(again, tensors) and found == state
        except CheckpointError as e:
            refused += 1
            assert checkpoint.name in str(e)
        if file.is_dir(): file.rmdir()
        file.write_bytes(good)
    assert refused > 0.8 * COUNTS["checkpoint"]
    assert latest_checkpoint(checkpoint.parent)[0] == checkpoint


def test_states_that_were_changed_and_sealed_again(checkpoint):
    "A forged state passes its checksum: it must be refused for what it says, or be read."
    rng, file = random.Random(1), checkpoint / "state.json"
    good = json.loads(file.read_text())
    odd = [None, 0, -1, 1e308, "", "../../x", "\0", [], {}, [[]], {"a": {}}, True, "model.safetensors", {"../../etc/passwd": "0" * 64}]
    for n in range(COUNTS["resealed"]):
        state = json.loads(json.dumps(good))
        for _ in range(rng.randint(1, 3)):
            place = rng.choice([state, state["files"]]) if isinstance(state.get("files"), dict) else state
            key = rng.choice([*place, "new"])
            if rng.random() < 0.3: place.pop(key, None)
            else: place[key] = rng.choice(odd)
        file.write_text(json.dumps(state | dict(sha256=runs._seal(state))))
        try: load_checkpoint(checkpoint)
        except CheckpointError: pass


def test_exported_encoders(tmp_path):
    rng, config = random.Random(2), AaSPConfig.preset("tiny", **TINY)
    torch.manual_seed(0)
    encoder = build_encoder(config)
    folder = save_encoder(encoder, config, tmp_path / "encoder")
    files = sorted(folder.iterdir())
    for n in range(COUNTS["encoder"]):
        file = rng.choice(files)
        good = file.read_bytes()
        file.write_bytes(mutate(rng, good))
        try: again, _ = load_encoder(folder)
        except (CheckpointError, ConfigError): pass
        else: assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values()))
        file.write_bytes(good)
    load_encoder(folder)


def test_manifests(tmp_path):
    good = ("path,label,split,fold\n" + "".join(f"a{i}/ü {i}.wav,c{i % 3};x,train,{i}\n" for i in range(6))).encode()
    rng, path, fine = random.Random(3), tmp_path / "m.csv", 0
    spice = (b'"', b"\n", b",", b"../", b"\xff", b"\xef\xbb\xbf", b"\0", b"\r", b"/etc/passwd", b'","', b"path", b";", b"x" * 200000)
    for n in range(COUNTS["manifest"]):
        path.write_bytes(mutate(rng, good, spice))
        try:
            m = Manifest.open(path)
            m.classes() if "label" in m else None
            m.targets(multi=True) if "label" in m else None
        except ManifestError as e: assert str(e); continue
        fine += 1
        assert len(m) and all(m.file(i).resolve().is_relative_to(tmp_path.resolve()) for i in range(len(m)))
    assert fine > 20


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_audio_files(tmp_path, suffix):
    rng, path = random.Random(4), tmp_path / f"a.{suffix}"
    sf.write(path, np.asarray(generate_clip("chirp", 0, 0, seconds=0.2)), 16000)
    good = path.read_bytes()
    for n in range(COUNTS["audio"] // 3):
        bad = bytearray(mutate(rng, good[:200])) + good[200:] if n % 2 else mutate(rng, good)
        path.write_bytes(bytes(bad))
        try:
            _, wave = audio_info(path), load_audio(path, duration=0.1 if n % 3 else None)
        except AudioError as e: assert str(path) in str(e)
        else: assert wave.ndim == 1 and len(wave) and wave.isfinite().all()


def test_metrics(tmp_path):
    rng, path = random.Random(5), tmp_path / "metrics.csv"
    good = ("step,loss,lr\n" + "".join(f"{i},{1 / i},0.1\n" for i in range(1, 20))).encode()
    for n in range(COUNTS["metrics"]):
        path.write_bytes(mutate(rng, good, (b"\0" * 50, b"\n", b",", b'"', b"nan")))
        series = read_metrics(tmp_path)
        assert not series or len({len(v) for v in series.values()}) == 1
        run = runs.RunDir(tmp_path / f"r{n}")
        shutil.copy(path, run.path / "metrics.csv")
        runs._metric_rows(run.path / "metrics.csv")
        run.add_metrics(dict(step=99, loss=1.0, lr=0.1))
        assert read_metrics(run.path)["step"][-1] == 99
        run.close()
        shutil.rmtree(run.path)


def test_decoded_caches_are_used_whole_or_made_anew(tmp_path):
    rng = random.Random(6)
    for i in range(3): sf.write(tmp_path / f"{i}.wav", np.asarray(generate_clip("chirp", i, 0, seconds=0.1)), 16000)
    manifest = Manifest.from_folder(tmp_path)
    want = [decode_once(manifest, folder=tmp_path / "cache").read(i) for i in range(3)]
    folder = next((tmp_path / "cache").iterdir())
    keep = shutil.copytree(folder, tmp_path / "keep")
    for n in range(COUNTS["cache"]):
        file = folder / rng.choice(["samples.npy", "index.npy", "broken.json"])
        data = file.read_bytes()
        edge = 200 if file.name == "samples.npy" else len(data)  # samples themselves carry no checksum
        cut = rng.random() < 0.2
        file.write_bytes(data[:rng.randrange(len(data))] if cut else mutate(rng, data[:edge]) + data[edge:])
        reader = decode_once(manifest, folder=tmp_path / "cache")
        for i in range(3):
            try: x = reader.read(i)
            except AudioError: continue
            assert len(x) == reader.samples(i) and x.isfinite().all()
        shutil.rmtree(folder)
        shutil.copytree(keep, folder)
    assert all(torch.equal(a, decode_once(manifest, folder=tmp_path / "cache").read(i)) for i, a in enumerate(want))
