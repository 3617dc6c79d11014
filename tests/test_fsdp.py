"""Sharded as training/accelerate/fsdp2.yaml does it, with torch's fully_shard, over gloo.

accelerate has no FSDP on a CPU (it would be DDP), so the sharding is done here, in the two ways that its versions have: every
layer and the rest, or every layer, the embedding, norm and head as one (1.15's), and the rest.
"""

from __future__ import annotations

import itertools
import os
import socket

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hybrid_models.modeling_hybrid_linear import HybridLinearDecoderLayer
from tests.common import VOCAB, tiny_model

# All kinds of parameter: decays of two elements (fewer than some shards), convolutions, attention, and lower bounds that
# belong to the whole model and are used by every layer.
MODELS = [("gated_delta_net", "3-1"), ("hgrn", "pure"), ("retnet", "3-1"), ("delta_net", "pure")]
STEPS, ROWS, TOKENS = 3, 4, 24


def shard(model, processes: int, ends: bool) -> None:
    mesh = init_device_mesh("cpu", (processes,))
    for module in list(model.modules()):
        if isinstance(module, HybridLinearDecoderLayer):
            fully_shard(module, mesh=mesh)
    if ends:
        fully_shard(model.model.embed_tokens, mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def trained(
    mixer: str, level: str, checkpointing: bool, ends: bool = False, rank: int = 0, processes: int = 1
) -> list[torch.Tensor]:
    """The losses, and every parameter after the steps."""
    model = tiny_model(mixer, level, torch.float64, num_hidden_layers=3).train()
    names = [name for name, _ in model.named_parameters()]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if processes > 1:
        shard(model, processes, ends)
    # Plain steps: an adaptive one blows rounding up where a gradient is nearly nothing.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(3, VOCAB, (ROWS, TOKENS), generator=generator)[rank::processes]
        loss = model(ids, labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    whole = [p.full_tensor() if processes > 1 else p.detach() for p in model.parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    return [torch.stack(losses), *whole]


def _one_process(rank: int, processes: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=processes)
    ways = itertools.product((False, True), (False, True))
    found = {(*model, *way): trained(*model, *way, rank, processes) for way in ways for model in MODELS}
    torch.save(found, f"{directory}/{rank}.pt")
    model = tiny_model("hgrn", "3-1")
    shard(model, processes, ends=True)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{directory}/saved", state_dict=whole)
    assert isinstance(model, FSDPModule)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_process, (2, port, str(directory)), nprocs=2)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)], directory / "saved"


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mixer,level", MODELS)
def test_two_shards_train_as_one(mixer, level, checkpointing, ends, sharded):
    losses, *parameters = trained(mixer, level, checkpointing)
    halves = [found[mixer, level, checkpointing, ends] for found in sharded[0]]
    # The same sums in another order, in float64 so that nothing else can hide there; measured below 1e-14.
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, losses, rtol=0, atol=1e-12)
    for half in halves:
        for got, want in zip(half[1:], parameters, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_what_a_sharded_model_saves_is_the_model(sharded, tmp_path):
    """fully_shard gives the model a class of torch's own, whose code a checkpoint must not carry in place of ours."""
    tiny_model("hgrn", "3-1").save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert {file.name for file in sharded[1].iterdir()} == files and "modeling_hybrid_linear.py" in files
    for name in files:
        assert (sharded[1] / name).read_bytes() == (tmp_path / name).read_bytes(), name
