"""Benchmarks at their full size, with files of one byte; downloads that break; results written by several processes at once."""
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import soundfile as sf

from aasp_nb import benchmarks
from aasp_nb.benchmarks import (BENCHMARKS, OLD_COLUMNS, SOURCES, BenchmarkError, Source, append_results, fetch_dataset, load_benchmark,
                                read_results)
from aasp_nb.data import Manifest, ManifestError


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
    manifest, report = load_benchmark(name, tmp_path, headers=0)
    assert report.complete, str(report)
    assert len(manifest) == sum(BENCHMARKS[name].counts.values()) and len(report.classes) == BENCHMARKS[name].n_classes
    manifest.file(7).unlink()
    with pytest.raises(BenchmarkError, match="missing or empty"): load_benchmark(name, tmp_path)
    _, report = load_benchmark(name, tmp_path, allow_missing=True, headers=0)
    assert not report.complete and len(report.missing) == 1
    report = load_benchmark(name, tmp_path, allow_missing=True, headers=20)[1]
    assert len(report.unreadable) == 20 and "unreadable: 20" in str(report)          # one byte is no audio


def test_lists_that_name_files_which_are_not_there(tmp_path):
    cremad(tmp_path)
    with open(tmp_path / "cremad.csv", "a") as f: f.write("gone1.wav,emotion0,test1,test\ngone2.wav,emotion0,test1,test\n")
    with pytest.raises(BenchmarkError, match=r"2 of 7,440 clips of CREMA-D are missing or empty.*gone1.wav, AudioWAV/gone2.wav"):
        load_benchmark("cremad", tmp_path)
    report = load_benchmark("cremad", tmp_path, allow_missing=True, headers=0)[1]
    assert report.missing == ["AudioWAV/gone1.wav", "AudioWAV/gone2.wav"] and report.found == BENCHMARKS["cremad"].counts


def test_duplicates_across_splits_are_warned_about(tmp_path):
    cremad(tmp_path)
    with open(tmp_path / "cremad.csv", "a") as f: f.write("7437.wav,emotion3,test37,train\n")
    with pytest.warns(UserWarning, match="1 of them in several splits or folds, as AudioWAV/7437.wav"):
        manifest, report = load_benchmark("cremad", tmp_path, headers=0)
    assert report.found == BENCHMARKS["cremad"].counts and any("listed twice" in o for o in report.odd)
    assert manifest.select(path="AudioWAV/7437.wav").columns["split"] == ["test"]
    own = tmp_path / "own.csv"
    own.write_text("path,label,split\na.wav,x,train\na.wav,x,test\nb.wav,x,train\n")
    with pytest.warns(UserWarning, match="stand in several splits, as 'a.wav'"): m = Manifest.open(own)
    assert m.columns["split"] == ["test", "train"]


def test_labels_outside_the_class_list(tmp_path):
    cremad(tmp_path)
    text = (tmp_path / "cremad.csv").read_text()
    (tmp_path / "cremad.csv").write_text(text.replace("7437.wav,emotion3", "7437.wav,boredom"))
    manifest, report = load_benchmark("cremad", tmp_path, headers=0)
    assert "7 classes instead of 6" in report.odd and not report.complete
    with pytest.raises(ManifestError, match="boredom.*not among the 6 classes"): manifest.targets([f"emotion{i}" for i in range(6)])


def test_audioset_tolerates_missing_videos_and_counts_them(tmp_path):
    head = "# a\n# b\n# YTID, start_seconds, end_seconds, positive_labels\n"
    ids = [f"{i:011d}" for i in range(300)]
    for name, part in (("balanced_train", ids[:200]), ("eval", ids[200:])):
        (tmp_path / f"{name}_segments.csv").write_text(head + "".join(f'{i}, 0.000, 10.000, "/m/{int(i) % 5}"\n' for i in part))
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n" + "".join(f'{i},/m/{i},"c{i}"\n' for i in range(5)))
    for i in ids[::2]: put(tmp_path / "clips" / f"Y{i}.wav")
    manifest, report = load_benchmark("as20k", tmp_path, headers=0)
    assert report.found == {"train": 100, "test": 50} and len(report.missing) == 150 and report.missing[0] == ids[1]
    assert any("train: 100 clips instead of 22,176" in o for o in report.odd) and manifest.targets(report.classes, multi=True).shape == (150, 5)


def append_many(table, worker):
    "What one of several processes does."
    for _ in range(20):
        rows = [dict(seed=s, value=.5, n=1, metric="accuracy", dataset=str(worker) * 200) for s in range(5)]
        append_results(table, rows, revision="r")


@pytest.mark.parametrize("header", ["", ",".join(OLD_COLUMNS) + "\r\n"], ids=["new", "older columns"])
def test_results_of_many_processes_keep_whole_rows(tmp_path, header):
    "Also while one of them gives an older file its new columns, which puts another file in its place."
    table = tmp_path / "sub" / "results.csv"
    table.parent.mkdir()
    if header: table.write_text(header)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=append_many, args=(table, w)) for w in range(3)]
    for w in workers: w.start()
    for w in workers: w.join(120)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    rows = read_results(table)
    assert len(rows) == 300 and {r["dataset"] for r in rows} == {str(w) * 200 for w in range(3)}


# --- downloads -------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    "Serves `files`; `cut` bytes end the first answer for a path, `pause` slows it down, `ranges` may be off."
    files, asked, ranges, cut, pause, tag = {}, [], True, None, 0.0, "1"
    def log_message(self, *a): pass

    def do_GET(self):
        path = self.path.split("?")[0]
        content, asked = self.files.get(path), self.headers.get("Range")
        if content is None: return self.send_error(404)
        fresh = self.headers.get("If-Range") == f'"{self.tag}"'
        start = int(asked[6:-1]) if asked and self.ranges and fresh else 0
        first = not any(p == path for p, _ in self.asked)
        self.asked.append((path, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{self.tag}"')
        if start: self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[start:self.cut if first and self.cut else None]
        try:
            for k in range(0, len(body), 1 << 15):
                self.wfile.write(body[k:k + (1 << 15)])
                time.sleep(self.pause)
        except OSError: pass


@pytest.fixture
def server():
    "A server of our own; yields (handler class, base URL)."
    handler = type("Handler", (Server,), dict(files={}, asked=[]))
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown(), http_server.server_close()


def audio(seconds=0.05, seed=0):
    "A short wav of noise, as bytes."
    out = io.BytesIO()
    sf.write(out, np.random.default_rng(seed).uniform(-0.5, 0.5, round(16000 * seconds)), 16000, format="WAV")
    return out.getvalue()


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data in members.items(): z.writestr(name, data)
    return out.getvalue()


def tarred(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


ESC50 = {"ESC-50-master/meta/esc50.csv": b"filename,fold,target,category,esc10,src_file,take\n" + b"".join(
    b"%d.wav,%d,0,dog,False,%d,A\n" % (i, i % 5 + 1, i) for i in range(10))} | {
    f"ESC-50-master/audio/{i}.wav": audio(1.0, i) for i in range(10)}


def offer(server, monkeypatch, name, files, known=None, **kw):
    "Put files on the server and let the benchmark's source point to them."
    handler, url = server
    handler.files |= {f"/{n}": data for n, data in files.items()}
    source = SOURCES[name]
    places = {n: (f"{url}/{n}", (known or {}).get(n)) for n in files}
    monkeypatch.setitem(SOURCES, name, Source(source.home, source.licence, source.size, places, manual=source.manual, **kw))
    return handler


def layouts():
    "Each benchmark's archives in the official layout, and the clips in them."
    seg = b'# a\n# b\n# YTID, start_seconds, end_seconds, positive_labels\n%s, 0.000, 10.000, "/m/0"\n'
    lists = {"eval_segments.csv": seg % (b"e" * 11), "balanced_train_segments.csv": seg % (b"b" * 11),
             "class_labels_indices.csv": b'index,mid,display_name\n0,/m/0,"Speech"\n'}
    return {
        "esc50": ({"ESC-50-master.zip": zipped(ESC50)}, 10),
        "us8k": ({"UrbanSound8K.tar.gz": tarred({
            "UrbanSound8K/metadata/UrbanSound8K.csv": b"slice_file_name,fsID,start,end,salience,fold,classID,class\n1-0-0-0.wav,1,0,4,1,3,0,siren\n",
            "UrbanSound8K/audio/fold3/1-0-0-0.wav": audio()})}, 1),
        "scv2": ({"speech_commands_v0.02.tar.gz": tarred({"./testing_list.txt": b"yes/a_nohash_0.wav\n", "./validation_list.txt": b"",
                                                          "./yes/a_nohash_0.wav": audio(), "./no/b_nohash_0.wav": audio()})}, 2),
        "nsynth": ({f"nsynth-{s}.jsonwav.tar.gz": tarred({
            f"nsynth-{s}/examples.json": json.dumps({f"bass_{s}": dict(instrument_family_str="bass", instrument_str=s)}).encode(),
            f"nsynth-{s}/audio/bass_{s}.wav": audio()}) for s in ("test", "valid", "train")}, 3),
        "as20k": (lists, 0),
        "as2m": (lists | {"unbalanced_train_segments.csv": seg % (b"u" * 11)}, 0),
    }


@pytest.mark.parametrize("name", ["esc50", "us8k", "scv2", "nsynth", "as20k", "as2m"])
def test_every_official_layout_is_fetched_and_read(server, monkeypatch, tmp_path, name):
    files, n = layouts()[name]
    handler = offer(server, monkeypatch, name, files, {k: "md5:" + hashlib.md5(v).hexdigest() for k, v in files.items()})
    lines = []
    folder = fetch_dataset(name, tmp_path, say=lines.append)
    told = "\n".join(lines)
    assert SOURCES[name].licence in lines[0] and SOURCES[name].size in lines[0]           # before anything starts
    if n: assert len(load_benchmark(name, folder)[0]) == n
    else:
        assert "YouTube" in told and str(folder) in told and "not usable yet" in told
        put(folder / "clips" / ("Y" + "e" * 11 + ".wav"))
        assert load_benchmark(name, folder, headers=0)[1].found == {"test": 1}
    before = len(handler.asked)
    fetch_dataset(name, tmp_path, say=lines.append)
    assert len(handler.asked) == before and not list(folder.glob(".download*")) and not list(folder.glob("tmp*"))


def test_cremad_comes_file_by_file_and_asks_for_the_split(server, monkeypatch, tmp_path):
    names = [f"10{i:02d}_DFA_ANG_XX" for i in range(12)]
    handler = offer(server, monkeypatch, "cremad", {"SentenceFilenames.csv": ("Stimulus_Number,Filename\n" + "".join(
        f"{i},{n}\n" for i, n in enumerate(names))).encode()}, each=("SentenceFilenames.csv", "Filename", server[1] + "/wav/{}.wav", "AudioWAV/{}.wav"))
    handler.files |= {f"/wav/{n}.wav": audio() for n in names}
    handler.files[f"/wav/{names[5]}.wav"] = b"version https://git-lfs.github.com/spec/v1"
    with pytest.raises(BenchmarkError, match="sent no wav file"): fetch_dataset("cremad", tmp_path, say=lambda line: None)
    handler.files[f"/wav/{names[5]}.wav"], lines = audio(), []
    folder = fetch_dataset("cremad", tmp_path, say=lines.append)
    assert "evar/metadata/cremad.csv" in "\n".join(lines) and len(list((folder / "AudioWAV").iterdir())) == 12
    (folder / "cremad.csv").write_text("file_name,label,speaker_id,split\n" + "".join(f"{n}.wav,ANG,{n[:4]},test\n" for n in names))
    assert load_benchmark("cremad", folder)[1].found == {"test": 12}


def test_a_lost_connection_goes_on_where_it_stopped(server, monkeypatch, tmp_path):
    data = zipped(ESC50)
    handler = offer(server, monkeypatch, "esc50", {"ESC-50-master.zip": data})
    handler.cut = len(data) // 2
    folder = fetch_dataset("esc50", tmp_path, say=lambda line: None)
    starts = [at for _, at in handler.asked]
    assert len(starts) == 2 and 0 < starts[1] <= len(data) // 2 and len(load_benchmark("esc50", folder)[0]) == 10


@pytest.mark.parametrize("change", ["no ranges", "another file"])
def test_a_download_that_cannot_go_on_starts_over(server, monkeypatch, tmp_path, change):
    data = zipped(ESC50)
    handler = offer(server, monkeypatch, "esc50", {"ESC-50-master.zip": data})
    handler.cut = len(data) // 2
    monkeypatch.setattr(benchmarks._Resuming.__init__, "__defaults__", (1,))
    with pytest.raises(BenchmarkError, match="run the same again"): fetch_dataset("esc50", tmp_path, say=lambda line: None)
    assert list((tmp_path / "esc50" / ".download").glob("*.part")) and not (tmp_path / "esc50" / "ESC-50-master").exists()
    if change == "no ranges": handler.ranges = False
    else: handler.tag, handler.files["/ESC-50-master.zip"] = "2", zipped(dict(reversed(ESC50.items())))
    folder = fetch_dataset("esc50", tmp_path, say=lambda line: None)
    assert handler.asked[-1][1] == 0 and len(load_benchmark("esc50", folder)[0]) == 10


def test_a_killed_download_goes_on(server, monkeypatch, tmp_path):
    data = zipped(ESC50)
    handler = offer(server, monkeypatch, "esc50", {"ESC-50-master.zip": data})
    handler.pause, part = 0.05, tmp_path / "esc50" / ".download" / "ESC-50-master.zip.part"
    worker = multiprocessing.get_context("fork").Process(target=fetch_dataset, args=("esc50", tmp_path))
    worker.start()
    end = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 1 << 16) and time.monotonic() < end: time.sleep(0.005)
    worker.kill(), worker.join(60)
    assert worker.exitcode == -signal.SIGKILL and not (tmp_path / "esc50" / "ESC-50-master").exists()
    handler.pause, kept = 0.0, part.stat().st_size
    folder = fetch_dataset("esc50", tmp_path, say=lambda line: None)
    assert handler.asked[-1][1] == kept > 0 and len(load_benchmark("esc50", folder)[0]) == 10
    assert sorted(p.name for p in folder.iterdir()) == [".fetched.json", "ESC-50-master"]


def test_damage_is_found_and_deleted(server, monkeypatch, tmp_path):
    fetch = lambda: fetch_dataset("esc50", tmp_path, say=lambda line: None)
    data = zipped(ESC50)
    offer(server, monkeypatch, "esc50", {"ESC-50-master.zip": data}, {"ESC-50-master.zip": "md5:" + "0" * 32})
    with pytest.raises(BenchmarkError, match="checksum"): fetch()
    for bad in (data[:len(data) // 2], tarred(ESC50)[:5000], zipped({"../../evil.txt": b"x"}), tarred({"../evil.txt": b"x"}),
                data.replace(ESC50["ESC-50-master/audio/3.wav"][2000:2100], b"\0" * 100)):
        offer(server, monkeypatch, "esc50", {"ESC-50-master.zip": bad})
        with pytest.raises(BenchmarkError, match="damaged or leaves its folder"): fetch()
        assert not (tmp_path / "esc50" / "ESC-50-master").exists() and not list(tmp_path.rglob("evil.txt"))
        assert not (tmp_path / "esc50" / "ESC-50-master.zip").exists()
    monkeypatch.setitem(SOURCES, "esc50", Source("", "", "", {"x.zip": (server[1] + "/nothing.zip", None)}))
    with pytest.raises(BenchmarkError, match="404"): fetch()
    offer(server, monkeypatch, "esc50", {"ESC-50-master.zip": data})
    assert len(load_benchmark("esc50", fetch())[0]) == 10


def test_too_little_space_for_a_download(server, monkeypatch, tmp_path):
    data = zipped(ESC50)
    handler = offer(server, monkeypatch, "esc50", {"ESC-50-master.zip": data})
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(BenchmarkError, match="free space or choose another root"): fetch_dataset("esc50", tmp_path, say=lambda line: None)
    monkeypatch.undo()
    offer(server, monkeypatch, "esc50", {"ESC-50-master.zip": data})

    def limited():
        "A limit on the size of a file stands in for a disk that fills up meanwhile."
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try: fetch_dataset("esc50", tmp_path, say=lambda line: None)
        except ManifestError as e: os._exit(3 if "is full" in str(e) and "run the same again" in str(e) else 4)
    worker = multiprocessing.get_context("fork").Process(target=limited)
    worker.start(), worker.join(60)
    assert worker.exitcode == 3
    assert len(load_benchmark("esc50", fetch_dataset("esc50", tmp_path, say=lambda line: None))[0]) == 10 and handler.asked[-1][1] > 0
