"""`make bench-traffic`: bytes that the GPU kernels of SBLU ask of L2, counted in Triton's interpreter, and times predicted from them.

Every load, store and addition of every program is seen as requests of 32 lanes; a request moves the 32-byte sectors that it
touches. Eight programs take turns in an L1 of 128 KiB (sectors, least recently used goes first); what misses it, and all
that is written, reaches L2. Operations on floats are counted too, per output. Those are counts, not times. Times are
predictions, the longest of three: bytes that reach L2 over 5.5 TB/s, bytes that memory cannot be spared (inputs and outputs
once) over the 3.0 TB/s of an H100's memory in a copy, operations over 132 multiprocessors of 128 lanes at 1.7 GHz, each
taken for one instruction (too many where a product and a sum become one, too few where addresses or waits take their turn).
"""
import argparse
import collections
import contextlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from aasp_nb.sblu import bound_parameters
from aasp_nb.sblu_ops import adaptive_sblu, sblu_patches

L1_BYTES, RESIDENT, L2_SPEED, MEMORY_SPEED, ISSUED = 128 * 1024, 8, 5.5e12, 3.0e12, 132 * 128 * 1.7e9


@contextlib.contextmanager
def recorded():
    "List of launches: {program: [(kind, sectors of each request)]} in the order of the program."
    builder, executor, launches = interpreter.InterpreterBuilder, interpreter.GridExecutor, []
    names = "create_masked_load", "create_masked_store", "create_atomic_rmw", "binary_op", "unary_op", "ternary_op"
    real = executor.__call__, *(getattr(builder, name) for name in names)

    def note(self, kind, places, mask):
        at, on = (np.asarray(t.data).reshape(-1) for t in (places, mask))
        if at.size == 1: return  # a scalar: no traffic to speak of
        on = np.broadcast_to(on.astype(bool), at.shape)
        size = np.dtype(interpreter._get_np_dtype(places.get_element_ty())).itemsize
        for i in range(0, at.size, 32):
            lanes = at[i:i + 32][on[i:i + 32]].astype(np.int64)
            if lanes.size: launches[-1][self.grid_idx].append((kind, np.unique(np.concatenate((lanes // 32, (lanes + size - 1) // 32)))))

    def launch(self, *args, **named):
        launches.append(collections.defaultdict(list))
        return real[0](self, *args, **named)
    def load(self, places, mask, *more): note(self, "load", places, mask); return real[1](self, places, mask, *more)
    def store(self, places, value, mask, *more): note(self, "store", places, mask); return real[2](self, places, value, mask, *more)
    def add(self, op, places, value, mask, *more): note(self, "add", places, mask); return real[3](self, op, places, value, mask, *more)
    def arithmetic(function):
        def counting(self, *args):
            out = function(self, *args)
            if out.data.dtype.kind == "f" and out.data.size > 1: launches[-1]["operations"].append(("operations", out.data.size))
            return out
        return counting
    executor.__call__ = launch
    for name, new in zip(names, (load, store, add, *map(arithmetic, real[4:]))): setattr(builder, name, new)
    try: yield launches
    finally:
        executor.__call__ = real[0]
        for name, old in zip(names, real[1:]): setattr(builder, name, old)


def reaching_l2(programs: list) -> collections.Counter:
    "Bytes by kind that reach L2 from programs that take turns, one request each, in one L1."
    cache, moved, queues = collections.OrderedDict(), collections.Counter(), [iter(p) for p in programs]
    while queues:
        for queue in list(queues):
            kind, sectors = next(queue, (None, ()))
            if kind is None: queues.remove(queue)
            for s in sectors:
                moved[kind] += 32 * (kind != "load" or s not in cache)
                if kind != "add":
                    cache[s] = True
                    cache.move_to_end(s)
                if len(cache) > L1_BYTES // 32: cache.popitem(last=False)
    return moved


def traffic(launches: list, outputs: int) -> dict:
    "Bytes per output by kind, their sum, and the most sectors that a kind's requests have on average."
    moved, requests, sectors = collections.Counter(), collections.Counter(), collections.Counter()
    operations = sum(n for programs in launches for _, n in programs.pop("operations", ()))
    for programs in launches:
        told = list(programs.values())
        for i in range(0, len(told), RESIDENT): moved += reaching_l2(told[i:i + RESIDENT])
        for kind, touched in (e for p in told for e in p):
            requests[kind] += 1
            sectors[kind] += len(touched)
    return {kind: moved[kind] / outputs for kind in ("load", "store", "add")} | dict(
        operations=operations / outputs, l2=sum(moved.values()) / outputs, sectors=max(sectors[k] / requests[k] for k in requests))


def dense(dtype, C=128, n_t=20, P=16, K=63):
    "(call, leaves): all patches of one clip; widths of the preset `base`, half its length."
    g = torch.Generator().manual_seed(0)
    u, a, b = (torch.randn(1, n, C, generator=g).transpose(1, 2) for n in (n_t * P, n_t, n_t))
    leaves = [t.to(dtype).requires_grad_() for t in (u, *bound_parameters(a, b, K, P))]
    return lambda: adaptive_sblu(*leaves, K, backend="triton"), leaves


def visible(dtype, M=16, n=32, grid=(8, 20), H=16, P=16, K=63):
    "(call, leaves): a fifth of the patches, in sorted order, of 16 views of one clip."
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(grid[0] * grid[1], generator=g)[:n].sort()[0] for _ in range(M)])[None]
    u = torch.randn(1, grid[1] * P, grid[0] * H, generator=g).transpose(1, 2)
    a, b = (torch.randn(1, M, n, H, generator=g) for _ in range(2))
    leaves = [t.to(dtype).requires_grad_() for t in (u, *bound_parameters(a, b, K, P))]
    return lambda: sblu_patches(*leaves, index, grid, K, backend="triton"), leaves


def measure(make, dtype, programs) -> list:
    "Rows (pass, floor, traffic) of the forward and the backward pass; gradients come in the layout of the outputs."
    from aasp_nb import sblu_gpu
    sblu_gpu.WANTED_PROGRAMS = programs
    call, leaves = make(dtype)
    with recorded() as forward: y = call()
    with recorded() as backward: torch.autograd.grad(y, leaves, torch.ones_like(y))
    size, n = leaves[0].element_size(), y.numel()
    shared, own = leaves[0].numel() / n * size, size + 2 * leaves[1].numel() / n * size
    return [("forward", shared + own, traffic(forward, n)), ("backward", 2 * shared + size + 4 * leaves[1].numel() / n * size, traffic(backward, n))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default="dense visible", help="which operations")
    asked, outputs = parser.parse_args().forms.split(), 512 * 128 * 608
    print("Predictions for 512 clips x 128 channels x 608 frames, K = 63: bytes per output, counted; milliseconds and ratio, predicted.\n")
    print("| form | pass | floor | loads | stores | additions | to L2 | sectors a request | operations | ms | over the floor |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for name in asked:
        for dtype in (torch.float32, torch.bfloat16):
            for part, floor, t in measure(globals()[name], dtype, 1):
                ms = 1e3 * outputs * max(t["l2"] / L2_SPEED, floor / MEMORY_SPEED, t["operations"] / ISSUED)
                print(f"| {name}, {str(dtype)[6:]} | {part} | {floor:.1f} | {t['load']:.1f} | {t['store']:.1f} | {t['add']:.1f} | {t['l2']:.1f} "
                      f"| {t['sectors']:.1f} | {t['operations']:.0f} | {ms:.2f} | {ms / (1e3 * outputs * floor / MEMORY_SPEED):.1f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
