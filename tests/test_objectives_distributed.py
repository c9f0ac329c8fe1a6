"""Contrastive loss over several processes: value and gradient equal one big batch."""
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aasp_nb.objectives import ContrastiveHead, cached_contrastive, contrastive_loss

WORLD, CLIPS, VIEWS, DIM = 2, 3, 4, 16


def _inputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(WORLD*CLIPS, VIEWS, DIM, generator=g)
    valid = torch.ones(WORLD*CLIPS, VIEWS, dtype=torch.bool)
    valid[0, 0] = valid[4, 1:] = False  # the processes hold different numbers of anchors
    torch.manual_seed(1)
    return x, valid, ContrastiveHead(DIM, 8)


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        x, valid, head = _inputs()
        own = slice(rank*CLIPS, (rank+1)*CLIPS)
        z = head(x[own])
        loss = contrastive_loss(z, valid=valid[own])
        value, grad = cached_contrastive(z, valid=valid[own])
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        for p in head.parameters():
            dist.all_reduce(p.grad)
            p.grad /= WORLD  # what data-parallel training does
        torch.save({"loss": mean/WORLD, "own": loss.detach(), "value": value, "grads": [p.grad for p in head.parameters()],
                    "z_grad": grad}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, args=(folder,), nprocs=WORLD, start_method="spawn")
        yield [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(WORLD)]


def test_gathered_loss_equals_one_big_batch(results):
    x, valid, head = _inputs()
    whole = contrastive_loss(head(x), valid=valid)
    whole.backward()
    for part in results:
        torch.testing.assert_close(part["loss"], whole.detach())
        for got, p in zip(part["grads"], head.parameters()):
            torch.testing.assert_close(got, p.grad, atol=1e-6, rtol=1e-4)


def test_cached_gradient_equals_one_big_batch(results):
    x, valid, head = _inputs()
    _, grad = cached_contrastive(head(x), valid=valid)
    # every process weighs its anchors by WORLD, as averaging over processes expects
    torch.testing.assert_close(torch.cat([part["z_grad"] for part in results]), grad*WORLD, atol=1e-6, rtol=1e-4)


def test_local_negatives_are_another_loss(results):
    x, valid, head = _inputs()
    local = sum(contrastive_loss(head(x[s]), valid=valid[s]) for s in (slice(0, CLIPS), slice(CLIPS, None)))/WORLD
    assert abs(local.item() - results[0]["loss"].item()) > 0.1
