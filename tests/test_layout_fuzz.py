"""Generated folders and tables: an independent reader says which clip belongs where with which label."""
import csv
import random
import unicodedata
import warnings

import numpy as np
import pytest
import soundfile as sf

from aasp_nb.data import FileReader, Manifest, ManifestError
from aasp_nb.finetuning import split_clips

LABELS = ["dog", "rain drops", "caf\u00e9", "cafe\u0301", "\u72d7", "3", "a;b", "a"]
SPLITS = ["train", "test", "valid", "dev", "val", "Train", "extra", ""]
ALIAS = {"train": "train", "test": "test", "valid": "valid", "dev": "valid", "val": "valid", "validation": "valid"}
nfc = lambda text: unicodedata.normalize("NFC", text)
SECONDS = 0.05


@pytest.fixture(scope="module")
def wave(tmp_path_factory):
    "The bytes of a short ramp, so that a segment's place shows in its first sample."
    path = tmp_path_factory.mktemp("wave") / "ramp.wav"
    sf.write(path, np.arange(round(16000 * SECONDS)) / 16000, 16000, "FLOAT")
    return path.read_bytes()


def put(path, wave):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wave)


def by_hand(rows):
    "Ten lines that know nothing of the package: {(path, start, end): (labels, split, fold)}, or the kind of refusal."
    out, rank = {}, {"test": 2, "valid": 1}
    for r in rows:
        key = (nfc(r["path"]), float(r.get("start") or 0), float(r.get("end") or 0))
        labels = tuple(sorted({x.strip() for x in nfc(str(r.get("label", ""))).split(";") if x.strip()}))
        split = ALIAS.get(r.get("split", "").lower(), r.get("split", ""))
        new = labels, split, str(r.get("fold", "")), nfc(str(r.get("label", "")))
        if key in out and new[3] != out[key][3]: return "stands twice"
        if key not in out or rank.get(split, 0) > rank.get(out[key][1], 0): out[key] = new
    return {k: v[:3] for k, v in out.items()}


def by_package(manifest):
    "The same from a manifest; labels through `targets`, parts through `split_clips`."
    m, n = manifest, len(manifest)
    column = lambda k: m.columns.get(k, [""] * n)
    labels = [tuple(sorted({x.strip() for x in l.split(";") if x.strip()})) for l in column("label")]
    classes = sorted({x for l in labels for x in l})
    if classes:
        hot = m.targets(classes, multi=True)
        labels = [tuple(c for c, on in zip(classes, row) if on) for row in hot]
    part = [ALIAS.get(s.lower(), s) for s in column("split")]
    return {(nfc(p), m.segment(i)[0], m.segment(i)[1] or 0.0): (labels[i], part[i], column("fold")[i])
            for i, p in enumerate(column("path"))}


def check_parts(manifest, want):
    "Train, valid and test hold exactly the rows that the other reader says; the rest is counted in one line."
    parts = {k: {s for s in ("train", "valid", "test") if s == v[1]} for k, v in want.items()}
    rest = sum(not p for p in parts.values())
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        try: got = split_clips(manifest)
        except ManifestError as e:
            assert "needs 'train' and 'test'" in str(e) and not {"train", "test"} <= {v[1] for v in want.values()}
            return
    said = [str(x.message) for x in w if "used in no part" in str(x.message)]
    assert len(said) == (rest > 0) and (not said or said[0].startswith(f"{rest} of {len(want)} clips"))
    keys = [(nfc(p), manifest.segment(i)[0], manifest.segment(i)[1] or 0.0)
            for i, p in enumerate(manifest.columns["path"])]
    for name in ("train", "valid", "test"):
        assert {keys[i] for i in getattr(got, name)} == {k for k, v in parts.items() if name in v}


def check_audio(manifest):
    "Every clip is read, from its own place."
    reader = FileReader(manifest)
    for i in range(len(manifest)):
        start, end = manifest.segment(i)
        x = reader.read(i)
        assert len(x) == reader.samples(i) == round(((end or SECONDS) - start) * 16000)
        assert abs(x[0].item() - start) < 1e-3


def make_table(rng, home, wave):
    "A random table of files, some named in the other unicode form; its rows, and the root it needs."
    root = home / rng.choice(["audio", "a b", "d\u00e9"])
    names = [rng.choice(["x", "sub/y", "u\u0308", "q.r"]) + f"{i}.wav" for i in range(rng.randint(1, 6))]
    for n in names: put(root / n, wave)
    columns = ["label"] + [c for c in ("split", "fold", "group") if rng.random() < 0.6]
    if rng.random() < 0.4: columns += ["start", "end"]
    rows = []
    for n in names:
        for k in range(rng.randint(1, 2)):
            form = rng.choice(["NFC", "NFD"]) if rng.random() < 0.3 else None
            row = dict(path=unicodedata.normalize(form, n) if form else n, label=rng.choice(LABELS + [""]))
            row |= dict(split=rng.choice(SPLITS), fold=rng.choice(["1", "2", "3", ""]), group=rng.choice("gh"))
            row |= dict(start=["", "0.02"][k], end=[rng.choice(["0.02", "0.01"]), ""][k])
            rows.append({c: row[c] for c in ["path", *columns]})
    rng.shuffle(rows)
    if rng.random() < 0.3: rows.append(dict(rows[0]))
    return root, rows


@pytest.mark.parametrize("block", range(10))
def test_tables(tmp_path, wave, block):
    for seed in range(block * 30, block * 30 + 30):
        rng, home = random.Random(seed), tmp_path / str(seed)
        root, rows = make_table(rng, home, wave)
        inner = rng.random() < 0.5
        table = (root if inner else home) / "manifest.csv"
        with table.open("w", newline="", encoding=rng.choice(["utf-8", "utf-8-sig"])) as f:
            out = csv.DictWriter(f, rows[0]); out.writeheader(); out.writerows(rows)
        want = by_hand(rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if want == "stands twice":
                with pytest.raises(ManifestError, match="stands twice"): Manifest.open(table, root)
                continue
            if rng.random() < 0.3:  # made in Python, with numbers
                rows = [{k: int(v) if k in ("label", "fold") and v.isdigit() else v or None if k != "path" else v
                         for k, v in r.items()} for r in {str(by_hand([r])): r for r in rows}.values()]
                if len(by_hand([{k: str(v or "") for k, v in r.items()} for r in rows])) < len(rows): continue
                m = Manifest(root, {k: [r[k] for r in rows] for k in rows[0]})
                want = by_hand([{k: str(v or "") for k, v in r.items()} for r in rows])
            else: m = Manifest.open(table, None if inner else root)
        assert by_package(m) == want, seed
        if all((root / p).exists() for p in m.columns["path"]): check_audio(m)
        if "split" in m: check_parts(m, want)


@pytest.mark.parametrize("block", range(10))
def test_folders(tmp_path, wave, block):
    for seed in range(300 + block * 20, 320 + block * 20):
        rng, root = random.Random(seed), tmp_path / str(seed)
        kind = rng.choice(["split", "fold", "label", "label_split", "foreign"])
        tops = dict(split=rng.sample(["train", "test", "valid", "dev", "Val"], 2) + ["train"],
                    fold=["fold1", "Fold_2", "fold 10"]).get(kind, ["train", "test"])
        if kind == "split" and len({ALIAS[t.lower()] for t in tops}) < 2: tops = ["train", "test"]
        above, rows = rng.choice(["", "data/"]), []
        for i, top in enumerate(dict.fromkeys(tops)):
            for label in rng.sample(["dog", "cat", "caf\u00e9" if i else "cafe\u0301"], 2):
                name = {"label": f"{label}/{i}", "label_split": f"{label}/{top}/{i}"}.get(kind, f"{top}/{label}/{i}")
                put(root / f"{above}{name}.wav", wave)
                split = ALIAS.get(top.lower(), "") if kind in ("split", "label_split") else ""
                fold = "".join(c for c in top if c.isdigit()) if kind == "fold" else ""
                seen = f"{above}{label}" if kind in ("label", "label_split") else label
                rows.append(dict(path=f"{above}{name}.wav", label=seen, split=split, fold=fold))
        if kind == "foreign":
            put(root / f"{above}noise/dog/1.wav", wave)
            with pytest.raises(ManifestError, match="noise.*move them away"): Manifest.open(root)
            continue
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter("always")
            m = Manifest.open(root)
        assert any("were taken as the" in str(x.message) for x in w) == (kind != "label"), seed
        assert by_package(m) == by_hand(rows), seed
        if "split" in m: check_parts(m, by_hand(rows))
