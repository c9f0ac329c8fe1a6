"""The fast SBLU operations against the direct sum, on every backend that this machine can run, and where things break."""
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from aasp_nb import sblu_cpu, sblu_gpu, sblu_ops
from aasp_nb.sblu import alpha_min, bound_parameters, sblu_reference
from aasp_nb.sblu_ops import adaptive_sblu, find_backend, last_backend, patches_direct, sblu_patches, use_backend

CPU = [b for b in ("numba", "torch") if b != "numba" or sblu_cpu.numba]
PHASES = ("even", "signed")


def dense(B=2, C=5, n_t=4, P=8, K=31, dtype=torch.float64, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    u, a, b = (torch.randn(B, C, n, generator=g, dtype=torch.float64) for n in (n_t * P, n_t, n_t))
    return [t.to(device, dtype).requires_grad_() for t in (u, *bound_parameters(a, b, K, max(P, 2)))]


def sparse(B=2, M=3, n=5, grid=(3, 6), H=4, P=8, K=31, dtype=torch.float64, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    N = grid[0] * grid[1]
    index = torch.stack([torch.randperm(N, generator=g)[:n] for _ in range(B * M)]).view(B, M, n) if B * M else torch.zeros(B, M, n, dtype=torch.int64)
    u = torch.randn(B, grid[0] * H, grid[1] * P, generator=g, dtype=torch.float64)
    a, b = (torch.randn(B, M, n, H, generator=g, dtype=torch.float64) for _ in range(2))
    return [t.to(device, dtype).requires_grad_() for t in (u, *bound_parameters(a, b, K, max(P, 2)))], index.to(device), grid


def agree(fast, judge, args, tol=1e-8):
    "Output and gradients, relative to the largest value of each."
    y, want = fast(*args), judge(*args)
    assert y.shape == want.shape and y.dtype == want.dtype
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(want)
    for got, ref in zip((y, *torch.autograd.grad(y, args, dy)), (want, *torch.autograd.grad(want, args, dy))):
        assert got.shape == ref.shape
        assert (got - ref).abs().max() <= tol * ref.abs().max(), ((got - ref).abs().max() / ref.abs().max()).item()


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("K", (3, 31, 63, 255, 511))
def test_equals_direct_sum_in_float64(backend, phase, K):
    for P, n_t, C in ((16, 4, 17), (7, 3, 3), (40, 1, 2), (1, 9, 4)):
        args = dense(2, C, n_t, P, K)
        agree(lambda *t: adaptive_sblu(*t, K, 0.9, phase, backend), lambda *t: sblu_reference(*t, K, 0.9, phase), args)
        assert last_backend() == last_backend("backward") == backend


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("phase", PHASES)
def test_visible_patches_equal_direct_sum(backend, phase):
    for K, P, H, M, n in ((63, 16, 16, 4, 9), (31, 5, 3, 1, 18), (255, 16, 20, 2, 4), (3, 8, 1, 3, 1)):
        args, index, grid = sparse(2, M, n, H=H, P=P, K=K)
        agree(lambda *t: sblu_patches(*t, index, grid, K, 1.0, phase, backend), lambda *t: patches_direct(*t, index, grid, K, 1.0, phase), args)


@pytest.mark.parametrize("backend", CPU)
def test_gradcheck(backend):
    for phase in PHASES:
        args = dense(1, 2, 2, 4, 7)
        assert torch.autograd.gradcheck(lambda *t: adaptive_sblu(*t, 7, 0.8, phase, backend), args)
        args, index, grid = sparse(1, 2, 3, (2, 3), 2, 4, 7)
        assert torch.autograd.gradcheck(lambda *t: sblu_patches(*t, index, grid, 7, 0.8, phase, backend), args)


@pytest.mark.parametrize("backend", CPU)
def test_ends_of_the_parameter_range(backend):
    for K in (31, 63):
        for alpha in (alpha_min(K), 0.25, 3.0, 50.0):
            for beta in (math.pi / 16, math.pi / 2, math.pi):
                u, *_ = dense(1, 3, 3, 16, K)
                al, be = (torch.full((1, 3, 3), v, dtype=torch.float64, requires_grad=True) for v in (alpha, beta))
                agree(lambda *t: adaptive_sblu(*t, K, backend=backend), lambda *t: sblu_reference(*t, K), [u, al, be])


@pytest.mark.parametrize("backend", CPU)
def test_zeros_and_small_and_large_values(backend):
    u, al, be = dense(1, 3, 3, 16, 31, torch.float32)
    zeros = torch.zeros_like(u).requires_grad_()
    y = adaptive_sblu(zeros, al, be, 31, backend=backend)
    grads = torch.autograd.grad(y.sum(), (zeros, al, be))
    assert y.abs().max() == 0 and all(g.abs().max() == 0 for g in grads)
    for scale in (1e-25, 1e25):
        tiny = (u.detach() * scale).requires_grad_()
        y, want = adaptive_sblu(tiny, al, be, 31, backend=backend), sblu_reference(tiny, al, be, 31)
        torch.testing.assert_close(y / scale, want / scale, rtol=1e-4, atol=1e-5)
        got, ref = (torch.autograd.grad(t.sum(), tiny)[0] for t in (y, want))
        torch.testing.assert_close(got, ref, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", CPU)
def test_decay_that_underflows(backend):
    u, _, be = dense(1, 3, 3, 8, 31, torch.float32)
    al = torch.full((1, 3, 3), 120.0, requires_grad=True)  # exp(-120) is 0 in float32, the gain is still finite
    y, want = adaptive_sblu(u, al, be, 31, backend=backend), sblu_reference(u, al, be, 31)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=0)
    scale = want.detach().max()
    for got, ref in zip(torch.autograd.grad((y / scale).sum(), (u, al, be)), torch.autograd.grad((want / scale).sum(), (u, al, be))):
        assert got.isfinite().all()
        torch.testing.assert_close(got, ref, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_what_is_not_finite_stays_in_its_windows(backend, value):
    for phase in PHASES:
        args = dense(2, 18, 5, 8, 7)
        with torch.no_grad(): args[0][0, 3, 17] = args[0][1, 17, 0] = value
        y, want = adaptive_sblu(*args, 7, 1.0, phase, backend), sblu_reference(*args, 7, 1.0, phase)
        assert torch.equal(y.isfinite(), want.isfinite()) and (~y.isfinite()).sum() == 7 + 4
        for got, ref in zip(torch.autograd.grad(y.sum(), args), torch.autograd.grad(want.sum(), args)):
            assert torch.equal(got.isfinite(), ref.isfinite())
            torch.testing.assert_close(got.nan_to_num(0, 0, 0), ref.nan_to_num(0, 0, 0), rtol=1e-9, atol=1e-9)
        args = dense(1, 3, 5, 8, 7)  # a gradient that is not finite reaches only the samples of its window
        dy = torch.ones(1, 3, 40, dtype=torch.float64)
        dy[0, 1, 20] = value
        grads = [torch.autograd.grad(f, args, dy) for f in (adaptive_sblu(*args, 7, 1.0, phase, backend), sblu_reference(*args, 7, 1.0, phase))]
        for got, ref in zip(*grads): assert torch.equal(got.isfinite(), ref.isfinite())


@pytest.mark.parametrize("backend", CPU)
def test_patch_of_not_finite_samples(backend):
    args, index, grid = sparse(1, 2, 9, (3, 6), 4, 8, 15)
    with torch.no_grad(): args[0][0, 2, 20] = math.nan
    y, want = (sblu_patches(*args, index, grid, 15, backend=b) for b in (backend, "reference"))
    assert torch.equal(y.isfinite(), want.isfinite()) and not y.isfinite().all()
    for got, ref in zip(torch.autograd.grad(y.sum(), args), torch.autograd.grad(want.sum(), args)):
        assert torch.equal(got.isfinite(), ref.isfinite())


@pytest.mark.parametrize("backend", CPU)
def test_memory_layouts(backend):
    u, al, be = (t.detach() for t in dense(3, 6, 4, 8, 15))
    want = sblu_reference(u, al, be, 15)
    views = (u.transpose(1, 2).contiguous().transpose(1, 2), al.flip(2).flip(2), be.repeat(1, 2, 1)[:, :6])
    assert not views[0].is_contiguous()
    leaves = [v.detach().requires_grad_() for v in views]
    y = adaptive_sblu(*leaves, 15, backend=backend)
    torch.testing.assert_close(y, want)
    y.transpose(1, 2).sum().backward()  # a gradient with zero strides
    ref = [t.clone().requires_grad_() for t in (u, al, be)]
    sblu_reference(*ref, 15).sum().backward()
    for got, want in zip(leaves, ref): torch.testing.assert_close(got.grad, want.grad)
    one = al[:, :1, :1].expand(3, 6, 4)  # one parameter for all
    torch.testing.assert_close(adaptive_sblu(u, one, one, 15, backend=backend), sblu_reference(u, one, one, 15))


@pytest.mark.parametrize("backend", CPU)
def test_empty_and_single(backend):
    args = dense(0, 3, 4, 8, 15)
    y = adaptive_sblu(*args, 15, backend=backend)
    assert y.shape == (0, 3, 32) and [g.shape for g in torch.autograd.grad(y.sum(), args)] == [a.shape for a in args]
    for B, M, n in ((2, 0, 5), (0, 2, 5), (2, 3, 0), (1, 1, 1)):
        args, index, grid = sparse(B, M, n)
        y = sblu_patches(*args, index, grid, 31, backend=backend)
        assert y.shape == (B, M, n, 4, 8)
        du, *_ = torch.autograd.grad(y.sum(), args)
        assert du.shape == args[0].shape and bool(du.any()) == (B * M * n > 0)


def test_many_views_and_repeated_tokens():
    args, index, grid = sparse(1, 40, 6, H=16, P=16)
    index[:, 1] = index[:, 0]
    index[:, 2, :] = 7
    agree(lambda *t: sblu_patches(*t, index, grid, 31), lambda *t: patches_direct(*t, index, grid, 31), args)
    for wrong in (-1, 18):
        index[0, 3, 2] = wrong
        with pytest.raises(ValueError, match="index must lie"): sblu_patches(*args, index, grid, 31)


def errors(call, args, exact, dy):
    "(RMS error, largest error) of output and gradients, relative to the RMS and to the largest value of `exact`."
    y = call(*args)
    pairs = zip((y, *torch.autograd.grad(y, args, dy.to(y))), exact)
    return [(((a - b).square().mean() / b.square().mean()).sqrt().item(), ((a - b).abs().max() / b.abs().max()).item()) for a, b in pairs]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype, K", ((torch.float32, 31), (torch.float32, 63), (torch.float32, 255), (torch.bfloat16, 63)))
def test_error_is_that_of_the_direct_sum(dtype, K, phase):
    """At most twice the direct sum's error in the same type, against float64: in RMS and in the maximum.

    Granted on top, since a recurrence rounds at every frame: one float32 ulp of the RMS, four of the maximum (the direct sum
    can be right to half an ulp). The gradient of a magnitude holds Y / |Y|, whose error is that of Y over |Y|: where a sum
    nearly cancels it is large for either method, and which of the two is worse at that one frame is chance. So the maximum of
    gradients is judged for a gradient dy = y, in which |Y| drops out; for random dy their RMS is."""
    ulp = torch.finfo(torch.float32).eps
    for low in (False, True):
        args = dense(2, 16, 12, 16, K)
        if low: args[1] = torch.full_like(args[1], alpha_min(K))
        single = [a.detach().to(dtype).requires_grad_() for a in args]
        wide = [a.detach().double().requires_grad_() for a in single]
        y = sblu_reference(*wide, K, 1.0, phase)
        noise = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for kind, dy in (("noise", noise.to(dtype).double()), ("y", y.detach().to(dtype).double())):
            exact = (y, *torch.autograd.grad(y, wide, dy, retain_graph=True))
            ours = errors(lambda *t: adaptive_sblu(*t, K, 1.0, phase), single, exact, dy)
            direct = errors(lambda *t: sblu_reference(*t, K, 1.0, phase), single, exact, dy)
            for i, ((rms, most), (its_rms, its_most)) in enumerate(zip(ours, direct)):
                assert rms <= 2 * its_rms + ulp, (kind, i, rms, its_rms)
                if i == 0 or kind == "y": assert most <= 2 * its_most + 4 * ulp, (kind, i, most, its_most)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("backend", CPU)
def test_half_precision(backend, dtype):
    args = [a.detach().to(dtype).requires_grad_() for a in dense(2, 5, 4, 16, 31)]
    exact = sblu_reference(*(a.detach().double() for a in args), 31)
    y, direct = adaptive_sblu(*args, 31, backend=backend), sblu_reference(*args, 31)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 2 * (direct.double() - exact).abs().max()
    assert [g.dtype for g in torch.autograd.grad(y.sum(), args)] == [dtype] * 3
    mixed = adaptive_sblu(args[0], *(a.float() for a in args[1:]), 31, backend=backend)
    torch.testing.assert_close(mixed, y)


def test_autocast_leaves_the_arithmetic_alone():
    args = dense(1, 4, 3, 8, 15, torch.float32)
    with torch.autocast("cpu", torch.bfloat16): y = adaptive_sblu(*args, 15)
    assert y.dtype == torch.float32 and torch.equal(y, adaptive_sblu(*args, 15))


def test_only_the_inputs_are_saved():
    for build in ("dense", "sparse"):
        if build == "dense": args, call = dense(2, 16, 4, 16, 63), lambda a: adaptive_sblu(*a, 63)
        else:
            args, index, grid = sparse(2, 3, 5, H=16, P=16)
            call = lambda a: sblu_patches(*a, index, grid, 63)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t): call(args)
        known = {a.data_ptr() for a in args} | ({index.data_ptr()} if build == "sparse" else set())
        assert set(saved) == known


def test_the_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            args = dense(3, 37, 6, 16, 63, torch.float32)
            y = adaptive_sblu(*args, 63)
            more, index, grid = sparse(2, 8, 9, H=16, P=16, dtype=torch.float32)
            z = sblu_patches(*more, index, grid, 63)
            results.append([y, *torch.autograd.grad(y.square().sum(), args), z, *torch.autograd.grad(z.square().sum(), more)])
        for other in results[1:]: assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    finally: torch.set_num_threads(before)


def work(seed):
    args = dense(2, 20, 5, 16, 63, torch.float32, seed)
    y = adaptive_sblu(*args, 63)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), args)]


def test_two_python_threads_at_once():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want, gate = {s: work(s) for s in range(2)}, threading.Barrier(2)
        def many(seed):
            torch.set_num_threads(2)
            gate.wait()
            return all(torch.equal(a, b) for _ in range(20) for a, b in zip(work(seed), want[seed]))
        with ThreadPoolExecutor(2) as pool: assert all(pool.map(many, range(2)))
    finally: torch.set_num_threads(before)


class Clips(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        torch.set_num_threads(2)
        return work(i)[0]


def test_forked_workers_after_use_in_the_parent():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = [work(i)[0] for i in range(4)]  # the parent's pool is alive when the workers are forked
        loader = torch.utils.data.DataLoader(Clips(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        for got, ref in zip(loader, want): assert torch.equal(got, ref)
    finally: torch.set_num_threads(before)


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    def forward(self, u):
        alpha, beta = bound_parameters(self.a, self.b, 15, 8)
        return adaptive_sblu(u, alpha.expand(len(u), -1, -1), beta.expand(len(u), -1, -1), 15)


def test_distributed_backward(tmp_path):
    u, plain, model = torch.randn(2, 4, 24), Tiny(), Tiny()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(model)(u).sum().backward()
        plain(u).sum().backward()
        for p, q in zip(model.parameters(), plain.parameters()): assert torch.equal(p.grad, q.grad)
    finally: torch.distributed.destroy_process_group()


def test_compiles_without_a_graph_break():
    args = dense(2, 4, 3, 8, 15, torch.float32)
    both = lambda u, a, b: adaptive_sblu(u * 2, a, b, 15).sin()
    fast = torch.compile(both, fullgraph=True, backend="aot_eager")
    y, want = fast(*args), both(*args)
    torch.testing.assert_close(y, want)
    for got, ref in zip(torch.autograd.grad(y.sum(), args), torch.autograd.grad(want.sum(), args)): torch.testing.assert_close(got, ref)
    more, index, grid = sparse(dtype=torch.float32)
    run = torch.compile(lambda u, a, b: sblu_patches(u, a, b, index, grid, 15) * 2, fullgraph=True, backend="aot_eager")
    y, want = run(*more), sblu_patches(*more, index, grid, 15) * 2
    torch.testing.assert_close(y, want)
    for got, ref in zip(torch.autograd.grad(y.sum(), more), torch.autograd.grad(want.sum(), more)): torch.testing.assert_close(got, ref)


def test_registered_as_torch_expects():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(sblu_ops.adaptive_sblu_op, (*dense(1, 2, 2, 4, 7), 7, 1.0, "even", "auto"), test_utils=checks)
    args, index, grid = sparse(1, 2, 3, (2, 3), 2, 4, 7)
    torch.library.opcheck(sblu_ops.sblu_patches_op, (*args, index, *grid, 7, 1.0, "signed", "auto"), test_utils=checks)


def test_vmap_is_refused_clearly():
    u, a, b = (t.detach() for t in dense(1, 2, 2, 4, 7))
    with pytest.raises(NotImplementedError, match="vmap"): torch.vmap(lambda x: adaptive_sblu(x, a, b, 7))(u.expand(3, 1, 2, 8))


def test_choice_of_backend(monkeypatch):
    args = dense(1, 2, 2, 4, 7)
    for name in (*CPU, "reference"):
        adaptive_sblu(*args, 7, backend=name)
        assert last_backend() == name
        with use_backend(name): adaptive_sblu(*args, 7)
        assert last_backend() == name
        monkeypatch.setenv("AASP_SBLU_BACKEND", name)
        adaptive_sblu(*args, 7)
        assert last_backend() == name
        monkeypatch.delenv("AASP_SBLU_BACKEND")
    with pytest.raises(RuntimeError, match="CUDA"): adaptive_sblu(*args, 7, backend="triton")
    assert find_backend() == find_backend("cpu", "auto") == ("numba" if sblu_cpu.numba else "torch")
    monkeypatch.setattr(sblu_ops, "installed", lambda package: False)
    adaptive_sblu(*args, 7)
    assert last_backend() == find_backend() == find_backend("cuda") == "torch"
    with pytest.raises(RuntimeError, match="needs numba"): adaptive_sblu(*args, 7, backend="numba")
    monkeypatch.setattr(sblu_cpu, "numba", None)
    with pytest.raises(RuntimeError, match="pip install numba"): sblu_cpu.ready_kernel(None, ())


def test_compilers_are_imported_when_they_are_needed():
    code = ("import sys, torch; from aasp_nb.sblu_ops import adaptive_sblu; assert not {'numba', 'triton'} & set(sys.modules); "
            "adaptive_sblu(torch.ones(1, 1, 4), *torch.ones(2, 1, 1, 2), 3, backend='torch'); assert 'numba' not in sys.modules; "  # torch itself may take Triton in
            "adaptive_sblu(torch.ones(1, 1, 4), *torch.ones(2, 1, 1, 2), 3); assert 'aasp_nb.sblu_gpu' not in sys.modules; print('lean')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "lean" in done.stdout, done.stderr[-2000:]


def test_wrong_arguments_say_what_is_wrong():
    u, a, b = dense(1, 2, 2, 4, 7)
    for call, text in ((lambda: adaptive_sblu(u, a, b, 8), "odd"), (lambda: adaptive_sblu(u, a, b, 7, phase="odd"), "phase must be"),
                       (lambda: adaptive_sblu(u[0], a, b, 7), "batch, channels, frames"), (lambda: adaptive_sblu(u, a[:, :1], b[:, :1], 7), "alpha must be"),
                       (lambda: adaptive_sblu(u[..., :7], a, b, 7), "do not divide"), (lambda: adaptive_sblu(u, a, b, 7, delta=0.0), "delta must be")):
        with pytest.raises(ValueError, match=text): call()
    args, index, grid = sparse()
    for call, text in ((lambda: sblu_patches(*args, index.int(), grid, 7), "int64"), (lambda: sblu_patches(*args, index[:, :1], grid, 7), "index must be"),
                       (lambda: sblu_patches(*args, index, (4, 6), 7), "does not fit")):
        with pytest.raises(ValueError, match=text): call()


# GPU kernels: interpreted here, compiled here, run where there is a GPU

INTERPRETED = """
import math, torch
from aasp_nb import sblu_gpu
from aasp_nb.sblu import sblu_reference
from aasp_nb.sblu_ops import adaptive_sblu, last_backend, patches_direct, sblu_patches
from test_sblu_ops import agree, dense, sparse
sblu_gpu.WANTED_PROGRAMS = 4  # so that patches are shared out among several programs
fast = lambda K, phase: lambda *t: adaptive_sblu(*t, K, 0.9, phase, "triton")
slow = lambda K, phase: lambda *t: sblu_reference(*t, K, 0.9, phase)
for phase, K, P, n_t, dtype, tol in (("even", 7, 4, 9, torch.float64, 1e-9), ("signed", 3, 8, 8, torch.float64, 1e-9), ("signed", 11, 4, 3, torch.float32, 1e-5),
                                     ("even", 5, 3, 3, torch.bfloat16, 0.02), ("even", 31, 16, 8, torch.float32, 1e-5), ("signed", 15, 7, 3, torch.float64, 1e-9),
                                     ("even", 9, 40, 1, torch.float64, 1e-9), ("signed", 5, 11, 2, torch.float64, 1e-9), ("even", 511, 8, 3, torch.float64, 1e-9),
                                     ("signed", 7, 1, 9, torch.float64, 1e-9)):
    args = dense(1, 3, n_t, P, K, dtype)
    agree(fast(K, phase), slow(K, phase), args, tol)
    if K < 500:
        args, index, grid = sparse(2, 2, 3, (2, 4), 3, P, K, dtype)
        agree(lambda *t: sblu_patches(*t, index, grid, K, 0.9, phase, "triton"), lambda *t: patches_direct(*t, index, grid, K, 0.9, phase), args, tol)
    assert last_backend() == last_backend("backward") == "triton"
for phase in ("even", "signed"):  # the kernel with a carry gives the same bits every time, and writes every number once
    args = dense(2, 33, 12, 8, 5, torch.float32)
    runs = [torch.autograd.grad(fast(5, phase)(*args).square().sum(), args) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    agree(fast(5, phase), slow(5, phase), args, 1e-5)
for value, K, P in ((math.nan, 5, 4), (math.inf, 7, 8), (math.nan, 3, 11)):
    for phase in ("even", "signed"):
        args, dy = dense(1, 2, 5, P, K), torch.ones(1, 2, 5 * P, dtype=torch.float64)
        with torch.no_grad(): args[0][0, 1, 5] = value
        dy[0, 0, 2 * P] = value
        y, want = fast(K, phase)(*args), slow(K, phase)(*args)
        assert torch.equal(y.isfinite(), want.isfinite()) and (~y.isfinite()).sum() == K
        for got, ref in zip(torch.autograd.grad(y, args, dy), torch.autograd.grad(want, args, dy)):
            assert torch.equal(got.isfinite(), ref.isfinite())
            torch.testing.assert_close(got.nan_to_num(0, 0, 0), ref.nan_to_num(0, 0, 0))
for scale in (0, 1e-25, 1e25):
    u, a, b = dense(1, 2, 3, 8, 9, torch.float32)
    u = (u.detach() * scale).requires_grad_()
    y, want = fast(9, "even")(u, a, b), slow(9, "even")(u, a, b)
    torch.testing.assert_close(y / (scale or 1), want / (scale or 1), rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (u, a, b)))
for shape in ((0, 3), (2, 0)):
    args, index, grid = sparse(shape[0], shape[1], 3, (2, 4), 3, 4, 5)
    y = sblu_patches(*args, index, grid, 5, 0.9, "even", "triton")
    assert y.numel() == 0 and torch.autograd.grad(y.sum(), args)[0].shape == args[0].shape
last = dense(2, 4, 3, 8, 7)[0].detach().transpose(1, 2).contiguous().transpose(1, 2)
moved = sblu_gpu.channels_last(last)
assert moved.data_ptr() == last.data_ptr() and fast(7, "even")(last, *(t.detach() for t in dense(2, 4, 3, 8, 7)[1:])).stride() == last.stride()
checks = ("test_schema", "test_autograd_registration", "test_faketensor")
from aasp_nb import sblu_ops
torch.library.opcheck(sblu_ops.adaptive_sblu_op, (*dense(1, 2, 2, 4, 7), 7, 1.0, "even", "triton"), test_utils=checks)
args, index, grid = sparse(1, 2, 3, (2, 3), 2, 4, 7)
torch.library.opcheck(sblu_ops.sblu_patches_op, (*args, index, *grid, 7, 1.0, "signed", "triton"), test_utils=checks)
print("interpreted")
"""


@pytest.mark.skipif(sblu_gpu.triton is None, reason="SKIPPED: no Triton")
def test_gpu_kernels_in_the_interpreter():
    here = os.path.dirname(__file__)
    env = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join([here, os.path.dirname(here)]))
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "interpreted" in done.stdout, done.stderr[-3000:]


def ahead_of_time(kernel, arch, K, dtype):
    "ptxas's report (registers, bytes of spills, bytes of stack) of a kernel as it is launched for 128 channels, 16 frames a patch."
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    dense = kernel.arg_names[3] != "index"
    forward, block = "y" in kernel.arg_names, sblu_gpu.DENSE_BLOCK if dense else sblu_gpu.VISIBLE_BLOCK
    fixed = dict(C=128, P=16, H=16, HALF=K // 2, SIGN=1.0, DELTA=1.0, BLOCK=block, WIDE=False,
                 S=sblu_gpu.even_pieces(16, sblu_gpu.FORWARD_PIECE if forward else sblu_gpu.BACKWARD_PIECE))
    fixed = {k: v for k, v in fixed.items() if k in kernel.arg_names}
    kinds = dict.fromkeys(("u", "alpha", "beta", "y", "dy"), f"*{dtype}") | dict.fromkeys(("du", "da", "db"), f"*{dtype}" if dense else "*fp32")
    kinds |= dict(index="*i64", odd="*i8", flags="*i32") | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(fn=kernel, signature={name: kinds.get(name, "i32") for name in kernel.arg_names}, constexprs=fixed)
    made = sblu_gpu.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=block // 32))
    ptxas = Path(sblu_gpu.triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    if not ptxas.exists(): pytest.skip(f"SKIPPED: no {ptxas.name}")
    name = re.search(r"\.target (\w+)", made.asm["ptx"])[1]
    told = subprocess.run([ptxas, "-v", f"--gpu-name={name}", "-o", os.devnull, "-"], input=made.asm["ptx"], capture_output=True, text=True)
    if told.returncode:  # this ptxas reads files only
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(made.asm["ptx"]); file.flush()
            told = subprocess.run([ptxas, "-v", f"--gpu-name={name}", "-o", os.devnull, file.name], capture_output=True, text=True, check=True)
    stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told.stderr).groups())
    return int(re.search(r"Used (\d+) registers", told.stderr)[1]), stores + loads, stack


KERNELS = ("dense_forward_kernel", "visible_forward_kernel", "dense_backward_kernel", "visible_backward_kernel", "mend_kernel")
COMPILED = [(name, 90, 63, "fp32") for name in KERNELS]  # half a minute each for those of the backward pass: the others are slow tests
COMPILED += [pytest.param(name, arch, K, dtype, marks=pytest.mark.slow) for name in KERNELS for arch in (80, 90, 100) for K in (31, 63, 127)
             for dtype in ("fp32", "bf16") if (name, arch, K, dtype) not in COMPILED]


@pytest.mark.skipif(sblu_gpu.triton is None, reason="SKIPPED: no Triton")
@pytest.mark.parametrize("name, arch, K, dtype", COMPILED)
def test_gpu_kernels_compile_without_spills(name, arch, K, dtype):
    registers, spilled, stack = ahead_of_time(getattr(sblu_gpu, name), arch, K, dtype)
    assert spilled == 0 and stack == 0, f"{registers} registers, {spilled} bytes spilled, stack of {stack} bytes"


@pytest.mark.skipif(sblu_gpu.triton is None, reason="SKIPPED: no Triton")
def test_delta_reaches_a_float64_kernel_unrounded():
    for kernel in (getattr(sblu_gpu, name) for name in KERNELS):  # a Python float that is no constant is a float32 for Triton
        constant = {p.name for p in kernel.params if p.is_constexpr}
        assert {"DELTA", "SIGN"} <= constant


@pytest.mark.skipif(sblu_gpu.triton is None, reason="SKIPPED: no Triton")
def test_a_fake_gpu_sees_the_layout_of_the_results():
    with torch._subclasses.FakeTensorMode():
        u, a = torch.empty(2, 32, 5, device="cuda").transpose(1, 2), torch.empty(2, 5, 4, device="cuda")
        y = adaptive_sblu(u, a, a, 7)
        du, da, _ = sblu_ops.adaptive_sblu_backward_op(y, u, a, a, 7, 1.0, "even", "auto")
        assert y.stride() == u.stride() == du.stride() == (160, 1, 5) and da.stride() == (20, 1, 5)
        a, index = torch.empty(2, 3, 4, 5, device="cuda"), torch.empty(2, 3, 4, device="cuda", dtype=torch.int64)
        assert sblu_patches(u, a, a, index, (1, 4), 7).transpose(-1, -2).is_contiguous()


@pytest.mark.skipif(sblu_gpu.triton is None, reason="SKIPPED: no Triton")
def test_gpu_additions_are_relaxed():
    source = Path(sblu_gpu.__file__).read_text()
    assert source.count("tl.atomic_add(") == source.count('sem="relaxed")') > 0


@pytest.mark.cuda
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("K", (3, 31, 63, 255, 511))
def test_on_a_gpu(phase, K):
    odd = ((7, 3, 3), (40, 1, 2), (1, 9, 4), (11, 2, 3)) if K == 31 else ()  # each size is compiled anew: seconds
    for P, n_t, C in ((16, 38, 128), *odd):
        args = dense(2, C, n_t, P, K, torch.float64, device="cuda")
        agree(lambda *t: adaptive_sblu(*t, K, 0.9, phase), lambda *t: sblu_reference(*t, K, 0.9, phase), args)
        single = [a.detach().float().requires_grad_() for a in args]
        agree(lambda *t: adaptive_sblu(*t, K, 0.9, phase), lambda *t: sblu_reference(*t, K, 0.9, phase), single, 1e-3)
        assert last_backend() == "triton"
        again = [torch.autograd.grad(adaptive_sblu(*single, K, 0.9, phase).sum(), single) for _ in range(2)]
        if sblu_gpu.carried_piece(P, K // 2): assert all(torch.equal(a, b) for a, b in zip(*again))
    types = ((torch.float64, 1e-8), (torch.float32, 1e-3), (torch.bfloat16, 0.03), (torch.float16, 0.03))
    for dtype, tol in types if K == 63 else types[1:2]:
        args, index, grid = sparse(3, 4, 10, (8, 13), 16, 16, K, dtype, device="cuda")
        agree(lambda *t: sblu_patches(*t, index, grid, K, 1.0, phase), lambda *t: patches_direct(*t, index, grid, K, 1.0, phase), args, tol)


@pytest.mark.cuda
def test_not_finite_on_a_gpu():
    args = dense(2, 18, 5, 8, 7, device="cuda")
    with torch.no_grad(): args[0][0, 3, 17] = args[0][1, 17, 0] = math.nan
    y, want = adaptive_sblu(*args, 7), sblu_reference(*args, 7)
    assert torch.equal(y.isfinite(), want.isfinite())
    for got, ref in zip(torch.autograd.grad(y.sum(), args), torch.autograd.grad(want.sum(), args)):
        assert torch.equal(got.isfinite(), ref.isfinite())
