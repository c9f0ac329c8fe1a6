"""What holds for any masks, crops, manifests and configurations, looked for by hypothesis."""
import json
import math
import os
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from aasp_nb.audio import AudioError
from aasp_nb.audio import valid_frames
from aasp_nb.data import (AudioDataset, Manifest, ManifestError, StepSampler, crop, crop_rng, epoch_order, inside,
                          join_clips)
from aasp_nb.masking import inverse_block_mask, masked_indices, num_visible, sample_queries, visible_indices
from aasp_nb.config import AaSPConfig, PRESETS
from aasp_nb.settings import ConfigError

settings.register_profile("here", max_examples=60, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("here")

grids = st.tuples(st.integers(1, 9), st.integers(1, 40))
ratios = st.floats(0.01, 0.99)
blocks = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 45)), min_size=1, max_size=4)


# --- masks -----------------------------------------------------------------------------------------------------------

@given(grids, ratios, st.integers(1, 5), st.integers(0, 3), blocks, st.integers(0, 2**31))
def test_every_view_keeps_exactly_as_many_patches_as_asked(grid, ratio, views, batch, sizes, seed):
    n = grid[0] * grid[1]
    make = lambda: inverse_block_mask(grid, ratio, views, batch, sizes, torch.Generator().manual_seed(seed))
    try: keep = num_visible(n, ratio)
    except ValueError:
        assert int(n * (1 - ratio) + 1e-6) in (0, n)
        return
    mask = make()
    assert mask.shape == (batch, views, n) and mask.dtype == torch.bool and torch.equal(mask, make())
    assert ((~mask).sum(-1) == keep).all() and 0 < keep < n
    seen, hidden = visible_indices(mask), masked_indices(mask)
    if not batch: return
    both = torch.cat([seen, hidden], -1).sort(-1).values
    assert torch.equal(both, torch.arange(n).expand(batch, views, n)) and (seen.diff(dim=-1) > 0).all()


@given(grids, ratios, st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_queries_are_masked_patches_and_as_many_as_asked(grid, ratio, share, seed):
    g = torch.Generator().manual_seed(seed)
    try: mask = inverse_block_mask(grid, ratio, 3, 2, generator=g)
    except ValueError: assume(False)
    q = sample_queries(mask, share, g)
    hidden = int(mask[0, 0].sum())
    assert q.shape == (2, 3, max(1, int(hidden * share + 1e-6))) and (q.diff(dim=-1) > 0).all()
    assert mask.gather(-1, q).all()


# --- crops -----------------------------------------------------------------------------------------------------------

class Ramp:
    "Clips whose samples are their own positions: 1, 2, 3, ..."
    def __init__(self, lengths): self.lengths = lengths
    def __len__(self): return len(self.lengths)
    def samples(self, i): return self.lengths[i]
    def read(self, i, start=0, count=None): return torch.arange(1, self.lengths[i] + 1).float()[start:][:count]


@given(st.integers(1, 5000), st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_crop_is_a_section_and_a_function_of_its_key(length, count, seed, epoch, index):
    x = crop(Ramp([length]), 0, count, crop_rng(seed, epoch, index))
    assert len(x) == min(length, count) and (x.diff() == 1).all() and 1 <= x[0] and x[-1] <= length
    assert torch.equal(x, crop(Ramp([length]), 0, count, crop_rng(seed, epoch, index)))


@given(st.lists(st.integers(1, 900), min_size=1, max_size=6), st.integers(1, 2000), st.integers(0, 300))
def test_joined_clips_keep_length_and_never_grow_louder(lengths, count, fade):
    x = join_clips([torch.ones(n) for n in lengths], count, fade)
    assert len(x) == min(sum(lengths), count) and (x <= 1).all() and (x >= 0).all()
    if len(lengths) == 1: assert (x == 1).all()


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=8), st.booleans(), st.booleans(), st.integers(0, 50), st.integers(0, 7))
def test_every_item_has_the_asked_length_and_says_how_much_is_real(lengths, fill, train, epoch, index):
    m = Manifest("/clips", dict(path=[f"{i}.wav" for i in range(len(lengths))], source=["s"] * len(lengths)))
    data = AudioDataset(m, 0.1, train=train, fill_crops=fill, reader=Ramp(lengths), max_broken=99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: item = data[index % len(lengths), epoch]
        except AudioError:
            assert not any(lengths)
            return
    if item is None:
        assert not train and not lengths[index % len(lengths)]
        return
    wave, valid = item["wave"], item["valid_samples"]
    assert wave.shape == (1600,) and 0 < valid <= 1600 and (wave[valid:] == 0).all() and lengths[item["index"]] > 0
    assert 1 <= valid_frames(valid) <= 11
    assert {i for i, _ in item["broken"]} <= {i for i, n in enumerate(lengths) if n == 0}


@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(1, 60), st.integers(0, 200), st.sampled_from([1, 2, 3]))
def test_order_is_a_function_of_seed_and_step(n, seed, batch, step, world):
    assume(batch <= n and batch % world == 0)
    a = StepSampler(n, batch, seed).batch(step)
    late = StepSampler(n, batch, seed, start=step)
    assert a == next(iter(late)) and len(set(a)) == batch and all(0 <= i < n for i, _ in a)
    parts = [StepSampler(n, batch, seed, rank=r, world=world).batch(step) for r in range(world)]
    assert sorted(sum(parts, [])) == sorted(a)
    assert sorted(epoch_order(n, seed, step)) == list(range(n))


# --- manifests -------------------------------------------------------------------------------------------------------

cell = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.data())
def test_a_manifest_survives_the_way_to_disk_and_back(tmp_path, data):
    paths = data.draw(st.lists(cell.map(lambda t: t.replace("/", "_") + ".wav"), min_size=1, max_size=6, unique=True))
    labels = data.draw(st.lists(cell, min_size=len(paths), max_size=len(paths)))
    m = Manifest(tmp_path, dict(path=paths, label=labels))
    again = Manifest.from_csv(m.to_csv(tmp_path / "m.csv"))
    assert again.columns == m.columns and again.root == m.root
    try: names = again.classes()
    except ManifestError: assert any(not l.strip(" ;") for l in labels); return
    multi = again.targets(multi=True)
    assert multi.shape == (len(paths), len(names)) and (multi.sum(1) >= 1).all()


parts = st.sampled_from(["..", ".", "a", "b c", "ü", "", "/", "a/..", "../..", "~", "c.wav"])


@given(st.lists(parts, min_size=1, max_size=6), st.booleans())
def test_no_path_leaves_its_root(pieces, absolute):
    text = ("/" if absolute else "") + "/".join(pieces)
    try: rel = inside("/data/clips", text)
    except ManifestError: return
    full = Path(os.path.normpath(os.path.join("/data/clips", rel)))
    assert full.is_relative_to("/data/clips") and full != Path("/data/clips")


# --- configurations ----------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-10, 5000), st.floats(allow_nan=True, allow_infinity=True, width=32))
anything = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=8), st.lists(numbers, max_size=3),
                     numbers.map(str), st.sampled_from(["None", "true", "1e-3", "(16, 16)", "[[4, 6]]", "signed", "standard", "cnn", "{}", "()"]))
changes = st.dictionaries(st.sampled_from(AaSPConfig.names()), anything, max_size=3)


@settings(max_examples=300)
@given(st.sampled_from(sorted(PRESETS)), changes)
def test_a_configuration_is_right_or_refused_by_name(preset, fields):
    try: c = AaSPConfig.preset(preset, **fields)
    except ConfigError as e:
        assert str(e)
        return
    again = AaSPConfig.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again == c and c.n_mels % c.patch_size[0] == 0 and c.n_frames % c.patch_size[1] == 0
    assert num_visible(c.n_patches, c.mask_ratio) >= 1 and all(math.isfinite(x) for x in (c.lr, c.norm_mean, c.norm_std))


@given(st.from_regex(r"[a-z_]{1,10}", fullmatch=True), anything)
def test_unknown_fields_are_refused(name, value):
    assume(name not in AaSPConfig.names() and name != "name")
    for make in (lambda: AaSPConfig.preset("tiny", **{name: value}), lambda: AaSPConfig.from_dict({name: value})):
        try: make()
        except ConfigError as e: assert repr(name) in str(e)
        else: raise AssertionError(name)


@given(st.recursive(anything, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=6))
def test_whatever_json_holds_is_a_configuration_or_refused(value):
    try: assert isinstance(AaSPConfig.from_dict(value), AaSPConfig)
    except ConfigError: pass
