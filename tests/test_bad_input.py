"""A test for each row of the table in nbs/bad_input.ipynb: a clear message that says what to do, and nothing lost."""
import io
import json
import math
import os
import re
import shutil
import signal
import tarfile
import tempfile
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file, save_file

from aasp_nb import loop, pretraining, runs, settings
from aasp_nb.audio import AudioError, LogMel, load_audio
from aasp_nb.clips import generate_clip, write_clips
from aasp_nb.data import AudioDataset, FileReader, Manifest, ManifestError, dataset_statistics, decode_once, train_loader
from aasp_nb.finetuning import FinetuneConfig, balanced_weights, prepare_task, split_clips
from aasp_nb.encoders import AaSPEncoder
from aasp_nb.config import AaSPConfig, build_encoder
from aasp_nb.settings import ConfigError
from aasp_nb.probing import longer_clips
from aasp_nb.processes import ProcessError, start_processes
from aasp_nb.shards import make_shards, read_tar
from aasp_nb.encoders import load_encoder
from aasp_nb.loop import TrainingError
from aasp_nb.pretraining import pretrain
from aasp_nb.runs import CheckpointError, RunDir, RunError, load_checkpoint, step_folders

FIELDS = dict(norm_measure=False)
CALL = dict(device="cpu", cache=False, workers=0, log_every=1, progress="none")


def config(**kw): return AaSPConfig.preset("nano", **{**FIELDS, **kw})


def refused(error, *words):
    "A context that expects an error with all of these words."
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(w)})" for w in words))


@pytest.fixture
def wav(tmp_path):
    "A function that writes a good clip."
    def write(name="a.wav", sr=16000, seconds=0.5, channels=1, **kw):
        x = np.asarray(generate_clip("chirp", 0, 0, sr=sr, seconds=max(seconds, 0.1)))[:round(seconds * sr)]
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / "d" / name, np.stack([x] * channels, 1), sr, **kw)
        return tmp_path / "d" / name
    return write


@pytest.fixture(scope="session")
def trained(clips, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    pretrain(config(), clips, run, save_every=2, **CALL)
    return run


@pytest.fixture
def copy(trained, tmp_path): return shutil.copytree(trained, tmp_path / "run")


def skipped(bad, *words):
    "A broken clip is refused alone with these words, and skipped, reported once and counted among good ones."
    with refused(AudioError, *words): load_audio(bad)
    for i in range(3): sf.write(bad.parent / f"good{i}.wav", np.asarray(generate_clip("chirp", i, 0, seconds=0.3)), 16000)
    listed = Manifest(bad.parent, dict(path=[bad.name, "good0.wav", "good1.wav", "good2.wav"]))
    data = AudioDataset(listed, 0.5)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        seen = torch.cat([b["index"] for b in train_loader(data, 2, stop=6)])
    assert len([x for x in w if "broken clip" in str(x.message)]) == 1 == len(data.broken.seen) and 0 not in seen and len(seen) == 12


# --- audio ------------------------------------------------------------------------------------------------------------

def test_row_other_rate(wav):
    assert abs(len(load_audio(wav(sr=44100))) - 8000) <= 1 and len(AudioDataset(wav().parent, 0.5)[0]["wave"]) == 8000


def test_row_stereo(wav):
    assert torch.allclose(load_audio(wav("two.wav", channels=2)), load_audio(wav("one.wav")), atol=1e-4)


def test_row_spaces_and_unicode(wav):
    wav("mit Leerzeichen/grün & 音.wav")
    m = Manifest.from_folder(wav().parent)
    again = Manifest.open(m.to_csv(m.root / "manifest.csv"))
    assert "mit Leerzeichen/grün & 音.wav" in again.columns["path"] and len(AudioDataset(again, 0.1)[1]["wave"]) == 1600


def test_row_shorter_than_a_patch(wav, tmp_path):
    wav("0.wav", seconds=0.01)
    out = pretrain(config(fill_crops=False), wav("1.wav", seconds=0.01).parent, tmp_path / "run", **CALL)
    assert out["step"] == 4 and math.isfinite(out["last"]["loss"]) and out["last"]["padded_share"] > 0.5


def test_row_ten_hours(wav, tmp_path):
    path = wav("long.wav", seconds=1.0)
    head = bytearray(path.read_bytes()[:44])
    size = 10 * 3600 * 32000
    head[4:8], head[40:44] = (size + 36).to_bytes(4, "little"), size.to_bytes(4, "little")
    path.write_bytes(head)
    os.truncate(path, size + 44)  # sparse: takes no space
    data = AudioDataset(path.parent, 0.5)
    assert data.reader.samples(0) == 36000 * 16000 and data[0, 3]["wave"].shape == (8000,)
    prepared = pretraining.prepare_data(config(), path.parent)
    assert isinstance(prepared.reader, FileReader)


def test_row_no_samples(wav):
    path = wav("bad.wav")
    sf.write(path, np.zeros(0), 16000)
    skipped(path, "bad.wav", "no audio samples", "leave it out")


def test_row_zero_bytes(wav):
    path = wav("bad.wav")
    path.write_bytes(b"")
    skipped(path, "bad.wav", "0 bytes", "again")


@pytest.mark.parametrize("value", [np.nan])
def test_row_nan_samples(wav, value):
    path, x = wav("bad.wav"), np.zeros(8000, np.float32)
    x[77] = value
    sf.write(path, x, 16000, subtype="FLOAT")
    skipped(path, "bad.wav", "NaN", "16-bit PCM")


def test_row_infinite_samples(wav): test_row_nan_samples(wav, -np.inf)


def test_row_truncated_wav(wav):
    path = wav("bad.wav")
    path.write_bytes(path.read_bytes()[:-4000])
    skipped(path, "bad.wav", "truncated", "copy it again")


def test_row_odd_rate(wav):
    assert len(load_audio(wav(sr=16001))) == 8000 and len(load_audio(wav(sr=44101))) == 8000


def test_row_cancelling_channels(wav):
    path = wav("two.wav")
    x, sr = sf.read(path)
    sf.write(path, np.stack([x, -x], 1), sr)
    with pytest.warns(UserWarning, match="two.wav.*loudest"): load_audio(path)
    assert np.allclose(load_audio(path, channel="loudest"), x, atol=1e-4)


def test_row_no_such_channel(wav):
    with refused(AudioError, "a.wav", "has 1 channel", "channel 1"): load_audio(wav(), channel=1)
    with refused(AudioError, "channel must be", "'left'"): FileReader(Manifest.from_folder(wav().parent), channel="left")


def test_row_mp3_without_length(wav):
    path = wav("a.mp3", seconds=2.0, bitrate_mode="VARIABLE", compression_level=0.3)
    data, want = path.read_bytes(), load_audio(path)
    at = max(data.find(b"Xing"), data.find(b"Info"))
    assert at > 0
    path.write_bytes(data[:at] + b"\0\0\0\0" + data[at + 4:])     # the frame stays, as one of silence
    got = load_audio(path)
    assert 0 < len(got) - len(want) < 3 * 1152 and (got[576 + 1105:][:len(want)] - want)[600:-1200].abs().max() < 1e-3


def test_row_flac_without_length(wav):
    path = wav("a.flac")
    data, want = bytearray(path.read_bytes()), load_audio(path)
    for total in (0, 1, 7000):
        data[22:26] = total.to_bytes(4, "big")
        path.write_bytes(data)
        assert torch.equal(load_audio(path), want)


def test_row_understated_length(wav):
    path = wav("bad.wav")
    data = bytearray(path.read_bytes())
    data[40:44] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    skipped(path, "bad.wav", "less sound than the file holds", "write it again")


def test_row_chained_ogg(wav):
    path = wav("bad.ogg")
    path.write_bytes(path.read_bytes() * 2)
    skipped(path, "bad.ogg", "several streams", "convert")


def test_row_not_full_scale(wav):
    path = wav("bad.wav")
    x, sr = sf.read(path, dtype="int16")
    sf.write(path, x.astype(np.float32), sr, subtype="FLOAT")
    skipped(path, "bad.wav", "full scale is 1", "divide")


def test_row_far_level(tmp_path):
    for i in range(5):
        x = np.random.default_rng(i).uniform(-0.5, 0.5, 8000)
        sf.write(tmp_path / f"{i}.wav", x / (32768 if i == 3 else 1), 16000, subtype="FLOAT")
    with pytest.warns(UserWarning, match=r"1 of 5 .*full scale.*3\.wav"): dataset_statistics(AudioDataset(tmp_path, 0.5, train=False), LogMel())


@pytest.mark.parametrize("kind", ["AIFF", "AU", "W64", "RF64", "NIST"])
def test_row_truncated_others(wav, kind):
    path = wav("bad.snd", format=kind)
    path.write_bytes(path.read_bytes()[:-2000])
    skipped(path, "bad.snd", "truncated", "again")


def test_row_truncated_flac(wav):
    path = wav("bad.flac")
    path.write_bytes(path.read_bytes()[:-2000])
    skipped(path, "bad.flac", "again")


def test_row_text_as_wav(wav):
    path = wav("bad.wav")
    path.write_text("this is text " * 100)
    skipped(path, "bad.wav", "cannot be read as audio", "convert")


def test_row_no_permission(wav):
    path = wav("bad.wav")
    path.chmod(0)
    if os.getuid(): return skipped(path, "bad.wav", "permissions")
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # root reads everything: be nobody for a moment
    place.chmod(0o755)
    try:
        shutil.copy(path, place / "bad.wav")
        (place / "bad.wav").chmod(0)
        os.seteuid(65534)
        try:
            with refused(AudioError, "bad.wav", "permissions"): load_audio(place / "bad.wav")
        finally: os.seteuid(0)
    finally: shutil.rmtree(place)


def test_row_missing_file(wav): skipped(wav("a.wav").parent / "bad.wav", "bad.wav", "no such file", "root")


def test_row_vanished(tmp_path):
    manifest = Manifest.open(write_clips(tmp_path / "c", per_class=1, seed=0, seconds=0.3))
    real = loop.Learner.step

    def step(self, batch, s):
        if s == 1: manifest.file(3).unlink()
        return real(self, batch, s)

    with pytest.MonkeyPatch.context() as m, pytest.warns(UserWarning, match="broken clip skipped"):
        m.setattr(loop.Learner, "step", step)
        out = pretrain(config(steps=15), manifest, tmp_path / "run", **CALL)
    assert out["status"] == "finished" and list(out["broken_clips"]) == [manifest.columns["path"][3]]


def test_row_too_many_broken(tmp_path):
    manifest = Manifest.open(write_clips(tmp_path / "c", per_class=1, seed=0, seconds=0.3))
    real = loop.Learner.step

    def step(self, batch, s):
        if s == 2:
            for i in range(5): manifest.file(i).write_bytes(b"")
        return real(self, batch, s)

    with pytest.MonkeyPatch.context() as m, warnings.catch_warnings(), refused(AudioError, "max_broken", "Check the data folder"):
        warnings.simplefilter("ignore")
        m.setattr(loop.Learner, "step", step)
        pretrain(config(steps=30), manifest, tmp_path / "run", save_every=1000, **CALL)
    path, _, state = runs.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert state["step"] >= 3  # what was trained is kept


def test_row_bare_integers():
    with refused(AudioError, "floating point", "full scale"): LogMel()(torch.zeros(1, 16000, dtype=torch.int16))


# --- manifests --------------------------------------------------------------------------------------------------------

def write(tmp_path, text):
    path = tmp_path / "m.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_row_no_data(tmp_path):
    with refused(ManifestError, "no data", "give a folder"): Manifest.open(tmp_path / "nothing")


def test_row_folder_without_audio(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with refused(ManifestError, "no audio below", ".wav"): Manifest.open(tmp_path)


def test_row_other_endings(wav, tmp_path):
    (wav().parent / "b.m4a").write_bytes(b"x")
    (wav().parent / "far").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match="left out.*1 .m4a files.*1 linked folders"): assert len(Manifest.open(wav().parent)) == 1
    wav().unlink()
    with refused(ManifestError, "no audio that can be read", "1 .m4a files"): Manifest.open(tmp_path / "d")


def test_row_empty_manifest(tmp_path):
    for text in ("", "path,label\n", "\n\n"):
        with refused(ManifestError, "no rows"): Manifest.open(write(tmp_path, text))


def test_row_no_path_column(tmp_path):
    with refused(ManifestError, "column 'path'", "file"): Manifest.open(write(tmp_path, "file,label\na.wav,x\n"))


def test_row_ragged_rows(tmp_path):
    with refused(ManifestError, "row 3", "3 fields", "2"): Manifest.open(write(tmp_path, "path,label\na.wav,x\nb.wav,x,y\n"))


def test_row_not_utf8(tmp_path):
    with refused(ManifestError, "UTF-8"): Manifest.open(write(tmp_path, b"path,label\n\xff\xfe.wav,x\n"))


def test_row_duplicate_paths(tmp_path):
    with pytest.warns(UserWarning, match="1 duplicate"): m = Manifest.open(write(tmp_path, "path,label\na.wav,x\n./a.wav,x\n"))
    assert len(m) == 1


def test_row_contradicting_labels(tmp_path):
    with refused(ManifestError, "a.wav", "twice", "'a;b'"): Manifest.open(write(tmp_path, "path,label\na.wav,x\na.wav,y\n"))


@pytest.mark.parametrize("path", ["../a.wav", "a/../../b.wav", "/etc/hostname", ".", ""])
def test_row_leaves_root(tmp_path, path):
    with refused(ManifestError, repr(path)): Manifest.open(write(tmp_path, f"path,label\nx.wav,1\n{path},1\n"))


def test_row_tar_leaves_root(tmp_path):
    def tar(*members):
        with tarfile.open(tmp_path / "d" / "a.tar", "w") as out:
            for name, data in members:
                info = tarfile.TarInfo(name)
                if data is None: info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
                else: info.size = len(data)
                out.addfile(info, io.BytesIO(data or b""))
        return tmp_path / "d" / "a.tar"

    (tmp_path / "d").mkdir()
    for name in ("../a.wav", "/etc/a.wav", "a/../../b.wav"):
        with refused(ManifestError, repr(name), "leaves the data folder"): read_tar(tar((name, b"x")))
    with refused(ManifestError, "'../b.wav'", "leaves"): read_tar(tar(("a.json", b'{"path": "../b.wav"}'), ("a.wav", b"x")))
    with refused(ManifestError, "a.wav", "link", "refused"): read_tar(tar(("a.wav", None)))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.tar"]


def test_row_no_labels(tmp_path):
    with refused(ManifestError, "no column 'label'"): Manifest.open(write(tmp_path, "path\na.wav\n")).classes()


def test_row_empty_labels(tmp_path):
    with refused(ManifestError, "no label", "b.wav"): Manifest.open(write(tmp_path, "path,label\na.wav,x\nb.wav,\n")).classes()


def test_row_unknown_labels(tmp_path):
    with refused(ManifestError, "['y']", "not among"): Manifest.open(write(tmp_path, "path,label\na.wav,x\nb.wav,y\n")).targets(["x"])


def test_row_unknown_column(tmp_path):
    m = Manifest.open(write(tmp_path, "path,split\na.wav,train\n"))
    with refused(ManifestError, "'fold'", "split"): m.select(fold=1)
    with refused(ManifestError, "test", "train"): m.select(split="test")


def test_row_unlabelled_negatives(tmp_path):
    m = Manifest("/d", {"path": ["a", "b", "c"], "label": ["x;y", "", "x"]})
    with refused(ManifestError, "no label", "classes=", "multi_label=True"): m.classes()
    with refused(ManifestError, "no label", "negatives"): m.targets(["x", "y"], multi=False)
    targets = m.targets(["x", "y"], multi=True)
    assert targets.tolist() == [[1, 1], [0, 0], [1, 0]] and (balanced_weights(targets) > 0).all()


def test_row_part_without_positive(wav, tmp_path):
    for name in "abc": wav(f"{name}.wav")
    m = Manifest(wav("a.wav").parent, {"path": ["a.wav", "b.wav", "c.wav"], "label": ["x", "", "x"],
                                       "split": ["train", "valid", "test"]})
    with refused(ManifestError, "none of the 1 valid clips", "classes="):
        prepare_task(FinetuneConfig.preset("as20k", frames=None), config(), m, classes=["x", "y"], cache=False)


def test_row_names_not_utf8(wav, tmp_path):
    folder = wav("good.wav").parent
    (folder / os.fsdecode(b"b\xe9.wav")).write_bytes((folder / "good.wav").read_bytes())
    with pytest.warns(UserWarning, match=r"1 files whose names are not UTF-8 are left out, as b\\xe9.wav"):
        m = Manifest.from_folder(folder)
    assert m.columns["path"] == ["good.wav"]
    with refused(ManifestError, r"b\xe9.wav", "not UTF-8"): Manifest(folder, {"path": [os.fsdecode(b"b\xe9.wav")]})


def test_row_two_forms_of_letters(wav, tmp_path):
    folder, one, two = wav("x.wav").parent, "caf\u00e9", "cafe\u0301"
    for name in (one, two): (folder / name).mkdir(), shutil.copy(folder / "x.wav", folder / name / "1.wav")
    (folder / "x.wav").unlink()
    assert Manifest.from_folder(folder).classes() == [one]
    shutil.rmtree(folder / two)
    (folder / "m.csv").write_text(f"path,label\n{two}/1.wav,{two}\n", encoding="utf-8")
    m = Manifest.open(folder / "m.csv")
    assert m.classes() == [one] and m.file(0).is_file() and len(m.select(label=two)) == 1


def tree(tmp_path, *names):
    for n in names:
        (tmp_path / n).parent.mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / n, np.zeros(1600), 16000)
    return tmp_path


def test_row_split_folders(tmp_path):
    with pytest.warns(UserWarning, match="taken as the split, not as labels"):
        m = Manifest.open(tree(tmp_path / "a", "train/dog/1.wav", "train/cat/1.wav", "dev/dog/2.wav", "test/dog/3.wav"))
    assert m.classes() == ["cat", "dog"] and m.values("split") == ["test", "train", "valid"]
    assert m.select(split="valid").columns["path"] == ["dev/dog/2.wav"]
    with pytest.warns(UserWarning, match="taken as the fold"):
        m = Manifest.open(tree(tmp_path / "b", "fold1/dog/1.wav", "fold10/dog/2.wav"))
    assert m.classes() == ["dog"] and m.columns["fold"] == ["1", "10"]


def test_row_foreign_folder(tmp_path):
    with refused(ManifestError, "['noise']", "move them away"):
        Manifest.open(tree(tmp_path, "train/dog/1.wav", "test/dog/1.wav", "noise/dog/1.wav"))


def test_row_unused_split(tmp_path):
    m = Manifest("/d", {"path": list("abcd"), "split": ["train", "dev", "test", "extra"]})
    with pytest.warns(UserWarning, match="1 of 4 clips are used in no part: split 'extra' 1"): parts = split_clips(m)
    assert [v.tolist() for v in (parts.train, parts.valid, parts.test)] == [[0], [1], [2]]


def test_row_segments(tmp_path):
    sf.write(tmp_path / "a.wav", np.repeat([0.1, 0.2, 0.3], 1600), 16000, "FLOAT")
    m = Manifest.open(write(tmp_path, "path,label,start,end\na.wav,x,0,0.1\na.wav,y,0.1,0.2\na.wav,z,0.2,\n"))
    for reader in (FileReader(m), decode_once(m, folder=tmp_path / "cache")):
        for i, value in enumerate((0.1, 0.2, 0.3)):
            x = reader.read(i)
            assert len(x) == reader.samples(i) == 1600 and (x - value).abs().max() < 1e-3
    shards = make_shards(m, tmp_path / "shards", progress=lambda line: None)
    assert [round(FileReader(shards).read(i)[5].item(), 3) for i in range(3)] == [0.1, 0.2, 0.3]
    assert len({m.stamp(i) for i in range(3)}) == 3


def test_row_bad_segments(tmp_path):
    for a, b in (("2", "1"), ("x", ""), ("-1", "1"), ("nan", "2")):
        with refused(ManifestError, "row 1", "a.wav", "seconds"): Manifest("/d", {"path": ["a.wav"], "start": [a], "end": [b]})
    m = Manifest(tree(tmp_path, "a.wav"), {"path": ["a.wav"], "start": [30], "end": [40]})
    with refused(AudioError, "a.wav", "behind its end at 0.10 s"): FileReader(m).read(0)


def test_row_other_root(tmp_path):
    tree(tmp_path / "audio", "a.wav")
    table = write(tmp_path, "path,label\na.wav,x\n")
    with pytest.warns(UserWarning, match="no clip of .*m.csv is below .*give root="): Manifest.open(table)
    assert Manifest.open(table, tmp_path / "audio").file(0).is_file()
    with refused(ManifestError, "no folder at root"): Manifest.open(table, tmp_path / "none")
    with refused(ManifestError, "root=", "CSV"): Manifest.open(tmp_path / "audio", tmp_path)


def test_row_numbers_as_labels(tmp_path):
    m = Manifest("/d", {"path": list("abcd"), "label": [0, 1.0, np.int64(2), "1"], "fold": [1, None, float("nan"), "2"]})
    assert m.columns["label"] == ["0", "1", "2", "1"] and m.columns["fold"] == ["1", "", "", "2"]
    assert m.targets().tolist() == [0, 1, 2, 1] and len(m.select(label=1)) == 2


def test_row_dotted_tar_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for k in range(3):
            for end, data in (("json", b'{"label": "%d"}' % k), ("wav", b"x")):
                info = tarfile.TarInfo(f"blues.{k:05d}.{end}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    assert [r["label"] for r in read_tar(tmp_path / "a.tar")] == ["0", "1", "2"]


def test_row_stereo_batch():
    model = AaSPEncoder(build_encoder(config()), config())
    with refused(AudioError, "(4000, 2)", "audio.mean(1)"): model.embed(np.zeros((4000, 2), np.float32), 16000)


def test_row_cut_clips(tmp_path):
    m = Manifest.open(tree(tmp_path, "a.wav", "b.wav"))
    sf.write(tmp_path / "a.wav", np.zeros(8000), 16000)
    with pytest.warns(UserWarning, match="1 of 2 clips .* longer than 0.3 s.*raise max_seconds"):
        longer_clips(m, 16000, 0.3, "raise max_seconds")


def test_row_damaged_cache(wav, tmp_path):
    m = Manifest.from_folder(wav().parent)
    want = decode_once(m, folder=tmp_path / "cache").read(0)
    for name in ("samples.npy", "index.npy", "broken.json"):
        file = next((tmp_path / "cache").iterdir()) / name
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.warns(UserWarning, match="damaged"): assert torch.equal(decode_once(m, folder=tmp_path / "cache").read(0), want)


# --- configuration ----------------------------------------------------------------------------------------------------

def test_row_unknown_preset():
    with refused(ConfigError, "'tinny'", "did you mean 'tiny'"): AaSPConfig.preset("tinny")


def test_row_unknown_field():
    with refused(ConfigError, "'mask_ration'", "did you mean 'mask_ratio'"): config(mask_ration=0.7)


def test_row_unknown_parameter(capsys, tmp_path):
    from aasp_nb.cli import USAGE, main
    assert main(["run", "pretrain", str(tmp_path / "o.ipynb"), "-p", "stepz", "5"]) == USAGE
    assert "did you mean 'steps'" in capsys.readouterr().err and not (tmp_path / "o.ipynb").exists()


def test_row_lost_tag(tmp_path):
    from aasp_nb.cli import UsageError, launch
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("a: int = 1")]), tmp_path / "a.ipynb")
    with refused(UsageError, "parameters", "needs one"): launch(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    with refused(ConfigError, "lost its tag"): settings.notebook_parameters(dict(In=["", "# Parameters\na = 3", "a: int = 1"], a=1))


def test_row_text_like_a_number(tmp_path, capsys):
    from aasp_nb.cli import FINISHED, find_notebook, main, typed
    typed_in = [("run_dir", "007"), ("data", "12e4567"), ("preset", "1e3")]
    assert typed(find_notebook("pretrain"), typed_in) == dict(typed_in)
    cells = [nbformat.v4.new_code_cell("a: str = ''\nb = 0", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("print([a, b])")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert main(["run", str(tmp_path / "a.ipynb"), str(tmp_path / "b.ipynb"), "-p", "a", "007", "-r", "b", "1e3"]) == FINISHED
    assert "['007', '1e3']" in capsys.readouterr().out


def test_row_other_kernel(tmp_path, capsys):
    from aasp_nb.cli import FINISHED, USAGE, main
    cells = [nbformat.v4.new_code_cell("a: int = 1", metadata=dict(tags=["parameters"]))]
    for name, language, code in (("conda-env-x-py", "python", FINISHED), ("ir", "R", USAGE)):
        meta = dict(kernelspec=dict(name=name, display_name=name, language=language))
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), tmp_path / f"{language}.ipynb")
        assert main(["run", str(tmp_path / f"{language}.ipynb"), str(tmp_path / "o.ipynb")]) == code
        said = "".join(capsys.readouterr())
        assert "running it with this Python's" in said if code == FINISHED else "only Python notebooks" in said


@pytest.mark.parametrize("field, value", [("views", "many"), ("views", 2.5), ("lr", "fast"), ("adaptive", "maybe"), ("patch_size", 16),
                                          ("phase", "odd"), ("block_sizes", "(4, 6)"), ("steps", None), ("seed", [1])])
def test_row_wrong_type(field, value):
    with refused(ConfigError, field, repr(value)): config(**{field: value})
    assert config(lr="1e-3", adaptive="true", n_frames="None", patch_size="(16, 16)").lr == 1e-3


@pytest.mark.parametrize("value", ["nan", math.nan, math.inf, "1e999"])
def test_row_not_finite_field(value):
    with refused(ConfigError, "lr"): config(lr=value)


def test_row_even_kernel():
    with refused(ConfigError, "kernel_size must be odd, got 64", "63 or 65"): config(kernel_size=64)


def test_row_bands_not_divisible():
    with refused(ConfigError, "n_mels 100", "patch height 16"): config(n_mels=100)


def test_row_frames_not_divisible():
    with refused(ConfigError, "n_frames 105", "112"): config(n_frames=105)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, 0.999])
def test_row_mask_ratio_0_or_1(value):
    with refused(ConfigError, "mask_ratio"): config(mask_ratio=value)


def test_row_zero_views():
    with refused(ConfigError, "views must be positive"): config(views=0)
    with refused(ConfigError, "views >= 2", "contrastive_weight = 0"): config(views=1)


def test_row_heads_not_divisible():
    with refused(ConfigError, "embed_dim 32", "num_heads 3"): config(num_heads=3)


def test_row_warmup_too_long():
    with refused(ConfigError, "warmup_steps 9", "lower warmup_steps"): config(warmup_steps=9)


def test_row_batch_larger_than_data(clips, tmp_path):
    with refused(ValueError, "batch_size is 64", "20 clips", "lower batch_size"): pretrain(config(batch_size=64), clips, tmp_path / "r", **CALL)


def test_row_batch_not_divisible():
    with refused(ConfigError, "batch_size 3", "accumulation_steps 2"): config(batch_size=3, accumulation_steps=2)


def test_row_newer_configuration():
    with refused(ConfigError, "version 2", "update"): AaSPConfig.from_dict(config().to_dict() | dict(version=2, brand_new=1))


# --- runs and checkpoints -----------------------------------------------------------------------------------------------

def test_row_run_exists(clips, trained):
    before = sorted(p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and p.name != ".lock")
    with refused(RunError, "holds a run already", 'resume="auto"'): pretrain(config(), clips, trained, **CALL)
    assert before == sorted(p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and p.name != ".lock")


def test_row_no_run_to_resume(clips, tmp_path):
    with refused(RunError, "no run to resume", "check run_dir"): pretrain(config(), clips, tmp_path / "r", resume=True, **CALL)


def test_row_folder_of_other_files(clips, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with refused(RunError, "not empty", "another run_dir"): pretrain(config(), clips, tmp_path, resume="auto", **CALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_row_second_run(copy):
    first = RunDir(copy, resume=True)
    try:
        with refused(RunError, "another process", "wait"): RunDir(copy, resume=True)
    finally: first.close()


def test_row_folder_not_writable(clips, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        with refused(RunError, "cannot write to run_dir", "another run_dir"): pretrain(config(), clips, place, **CALL)


def test_row_home_not_writable(clips, tmp_path, monkeypatch):
    from aasp_nb import probing
    (tmp_path / "file").touch()
    monkeypatch.setenv("AASP_HOME", str(tmp_path / "file" / "home"))  # below a file: nobody can write there, not even root
    monkeypatch.setattr(probing, "extract_baseline", lambda *a, **k: pytest.fail("features were computed first"))
    with refused(probing.ProbeError, "cannot be written", "AASP_HOME"): probing.run_probe("logmel", clips, steps=1, seeds=(0,))
    with refused(ManifestError, "cannot be written", "AASP_HOME"): decode_once(Manifest.open(clips))


def test_row_disk_full(clips, tmp_path, monkeypatch):
    real = runs.save_checkpoint

    def full(folder, *a):
        if folder.name == "step-00000004": raise OSError(122, "Disk quota exceeded")
        return real(folder, *a)

    monkeypatch.setattr(runs, "save_checkpoint", full)
    with refused(RunError, "Disk quota exceeded", "Free space", 'resume="auto"'):
        pretrain(config(steps=50), clips, tmp_path / "run", save_every=2, **CALL)
    monkeypatch.undo()
    assert runs.latest_checkpoint(tmp_path / "run" / "checkpoints")[2]["step"] == 2
    assert pretrain(config(steps=50), clips, tmp_path / "run", resume=True, max_steps=6, **CALL)["step"] == 6


def test_row_other_configuration(clips, copy):
    with refused(RunError, "another configuration", "lr: 0.001 in the run, 0.01 now"): pretrain(config(lr=0.01), clips, copy, resume=True, **CALL)


def test_row_other_data(wav, copy):
    with refused(RunError, "another data set", "clips"): pretrain(config(), wav().parent, copy, resume=True, **CALL)


def test_row_damaged_run_record(clips, copy):
    (copy / "config.json").write_text('{"lr": 0.')
    with refused(RunError, "config.json", "restore it"): pretrain(config(), clips, copy, resume=True, **CALL)


def test_row_damaged_checkpoint(clips, copy):
    file = step_folders(copy / "checkpoints")[-1] / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="step-00000004.*optimizer.safetensors is damaged.*the one before"):
        assert pretrain(config(), clips, copy, resume=True, **CALL)["status"] == "finished"


def test_row_no_whole_checkpoint(clips, copy):
    for p in step_folders(copy / "checkpoints"): (p / "state.json").write_text("{")
    with warnings.catch_warnings(), refused(RunError, "no checkpoint", "whole", "another run_dir"):
        warnings.simplefilter("ignore")
        pretrain(config(), clips, copy, resume=True, **CALL)


def reseal(folder, **change):
    state = json.loads((folder / "state.json").read_text()) | change
    (folder / "state.json").write_text(json.dumps(state | dict(sha256=runs._seal(state))))


def test_row_newer_checkpoint(copy):
    last = step_folders(copy / "checkpoints")[-1]
    reseal(last, format=2)
    with refused(CheckpointError, last.name, "format 2", "reads 1"): load_checkpoint(last)


def test_row_checkpoint_of_another_model(copy):
    tensors, state = load_checkpoint(step_folders(copy / "checkpoints")[-1])
    with refused(CheckpointError, "another model", "tensors differ"):
        pretraining.build_learner(config(embed_dim=64)).load_state(tensors, state)
    tensors["model"].pop("student.cls_token")
    with refused(CheckpointError, "student.cls_token"): pretraining.build_learner(config()).load_state(tensors, state)


def test_row_missing_tensor(copy):
    weights = load_file(copy / "encoder" / "model.safetensors")
    weights.pop("cls_token")
    save_file(weights, copy / "encoder" / "model.safetensors")
    with refused(CheckpointError, "damaged", "again"): load_encoder(copy / "encoder")
    (copy / "encoder" / "checksums.json").unlink()
    with refused(CheckpointError, "cls_token", "missing"): load_encoder(copy / "encoder")


def test_row_pickle(tmp_path):
    class Bomb:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/exploded",)
    torch.save(dict(x=Bomb()), tmp_path / "model.pt")
    (tmp_path / "enc").mkdir()
    shutil.copy(tmp_path / "model.pt", tmp_path / "enc" / "model.safetensors")
    (tmp_path / "enc" / "config.json").write_text("{}")
    for call in (lambda: load_checkpoint(tmp_path / "model.pt"), lambda: load_encoder(tmp_path / "model.pt")):
        with refused(CheckpointError, "pickles are never read", "safetensors"): call()
    with refused(CheckpointError, "enc"): load_encoder(tmp_path / "enc")
    assert not (tmp_path / "exploded").exists()


# --- devices -------------------------------------------------------------------------------------------------------------

def test_row_foreign_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(architectures=["ASTModel"], model_type="audio-spectrogram-transformer")))
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with refused(CheckpointError, "audio-spectrogram-transformer", "give a run folder"): load_encoder(tmp_path)


def test_row_drop_path_with_checkpoint():
    from aasp_nb import doors
    model = doors.make_timm("tiny", checkpoint=doors.DEMO, drop_path_rate=0.5)
    x = torch.randn(2, 1, 128, 48)
    assert model.config.drop_path == 0.5 and torch.allclose(model(x), doors.make_timm("tiny", checkpoint=doors.DEMO)(x), atol=1e-5)
    assert not torch.equal(model.train()(x), model(x))


def test_row_classifier_rate(tmp_path):
    from aasp_nb.finetuning import FinetuneModel, load_classifier, save_classifier
    c = config()
    save_classifier(FinetuneModel(build_encoder(c), 3).eval(), c, c, list("abc"), False, tmp_path / "m")
    model, x = load_classifier(tmp_path / "m"), torch.randn(2, 8000) / 10
    assert model.sample_rate == 16000 and torch.equal(model(x, sr=16000), model(x))
    with refused(AudioError, "wave[None]"): model(x[0])


def test_row_onnx_too_long():
    from types import SimpleNamespace
    from aasp_nb.doors import run_onnx
    meta = SimpleNamespace(custom_metadata_map=dict(aasp_config=json.dumps(config().to_dict())))
    session, most = SimpleNamespace(get_modelmeta=lambda: meta), config().n_frames
    with refused(ValueError, f"at most {most} frames", "windows"): run_onnx(session, np.zeros((1, 128, most + 16), np.float32))
    with refused(ValueError, "multiple of the patch width 16"): run_onnx(session, np.zeros((1, 128, 17), np.float32))


def test_row_port_taken(capsys):
    import socket
    from aasp_nb.cli import USAGE, main
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)), s.listen()
        assert main(["dashboards", ".", "--port", str(s.getsockname()[1])]) == USAGE
    assert "in use by another program" in capsys.readouterr().err


def test_row_no_gpu(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(RunError, "no GPU", 'device="cpu"'): pretrain(config(), clips, tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()


def test_row_too_many_processes(clips, tmp_path, monkeypatch):
    with refused(RunError, "batch_size 2", "(3)"): pretrain(config(), clips, tmp_path / "run", processes=3, **CALL)
    for name, value in (("is_available", True), ("is_bf16_supported", True), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda *a, v=value: v)
    with refused(RunError, "processes=2", "1 are visible", "lower processes"):
        pretrain(config(), clips, tmp_path / "run", processes=2, **{**CALL, "device": "cuda"})
    assert not (tmp_path / "run").exists()


def test_row_lost_processes(capsys):
    with refused(ProcessError, "lost (SIGKILL)", "2 times", "lower batch_size"): start_processes(signal.raise_signal, 1, (9,), restarts=1)
    assert "starting all again" in capsys.readouterr().out


def test_row_unknown_device():
    with refused(RunError, "'gpu'", "auto, cpu or cuda"): loop.pick_device("gpu")


def test_row_no_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Old GPU")
    with refused(RunError, "Old GPU", "set precision to fp32"): loop.pick_device("cuda", "bf16")


def test_row_cpu_without_bf16(monkeypatch, capsys):
    for module in (loop, pretraining): monkeypatch.setattr(module, "cpu_has_bf16", lambda: False)
    with refused(RunError, "no bf16 instructions", "set precision to fp32"): loop.pick_device("cpu", "bf16")
    assert pretraining.fitting_precision(AaSPConfig.preset("base"), "cpu").precision == "fp32"
    assert "training in fp32" in capsys.readouterr().out


def test_row_out_of_memory(clips, tmp_path, monkeypatch):
    def step(self, batch, s): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(loop.Learner, "step", step)
    with refused(RunError, "out of memory", "accumulation_steps (now 1)", "batch_size (2)", "views (2)"):
        pretrain(config(), clips, tmp_path / "run", **CALL)


def test_row_not_finite_loss(clips, tmp_path, monkeypatch):
    real = pretraining.AaSPLearner.loss
    monkeypatch.setattr(pretraining.AaSPLearner, "loss", lambda self, b, g: (real(self, b, g)[0] * math.nan, real(self, b, g)[1]))
    with refused(TrainingError, "not finite", "bad_steps.json", "lower lr"): pretrain(config(steps=40), clips, tmp_path / "run", **CALL)
    assert len(json.loads((tmp_path / "run" / "bad_steps.json").read_text())) >= 20


# --- the table -----------------------------------------------------------------------------------------------------------

def test_row_collapse(tmp_path):
    guard = loop.Guard(RunDir(tmp_path / "run"), limits=pretraining.limits(config()))
    warm = config().warmup_steps
    for step in (warm - 1, warm, warm + 1): guard.check(step, dict(teacher_std=0.05, target_std=0.99, prediction_std=0.5), [], 5)
    assert [(a["series"], a["step"]) for a in guard.alarms] == [("teacher_std", warm)]
    assert "raise ema_base" in (tmp_path / "run" / "log.txt").read_text()
    guard.run.close()


def test_every_row_of_the_table_has_a_test_and_every_test_a_row():
    page = nbformat.read(Path(__file__).parent.parent / "nbs" / "bad_input.ipynb", 4)
    rows = [m for c in page.cells if c.cell_type == "markdown" for m in re.findall(r"^\| (\w+) \|", c.source, re.M) if m != "row"]
    tests = [n.removeprefix("test_row_") for n in globals() if n.startswith("test_row_")]
    assert sorted(rows) == sorted(tests) and len(rows) >= 30
