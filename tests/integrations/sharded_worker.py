"""What each of two processes does for `test_sharded.py`: the ways of torch to train a model in several processes."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import hf_actnn

WIDTH, CLASSES = 64, 10
Shard = Callable[[nn.Module], nn.Module]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, 4, WIDTH // 4)
        q, k, v = self.qkv(self.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    """A vision transformer without dropout and batch statistics: its gradient is the mean over the samples."""

    checkpoints = False

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(self.norm(x).mean(1))


class Table(nn.Module):
    """Gives a tensor that is computed from a matrix alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self) -> Tensor:
        return torch.tanh(self.weight)


class TwoGroups(nn.Module):
    """One part is multiplied with what the other gives; each is sharded for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = Table(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x)[:, None] * self.table()).mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 3, 16, 16, generator=generator), torch.randint(0, CLASSES, (16,), generator=generator)


def mine(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    share = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    return pixels[share], labels[share]


def gradient(model: nn.Module) -> Tensor:
    """Of all processes, ``[P]``."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([(one.full_tensor() if isinstance(one, DTensor) else one).flatten() for one in grads]).double()


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# -- ways to wrap ------------------------------------------------------------------------------------------------------


def ddp(hook: Callable[[DistributedDataParallel], None] | None = None, **options: Any) -> Shard:
    def wrap(model: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(model, **options)
        if hook is not None:
            hook(wrapped)
        return wrapped

    return wrap


def use_power_sgd(model: DistributedDataParallel) -> None:
    state = power_sgd.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(state, power_sgd.powerSGD_hook)


def fsdp(parts: Callable[[nn.Module], Iterable[nn.Module]], keep: bool = False, **options: Any) -> Shard:
    def wrap(model: nn.Module) -> nn.Module:
        for part in (*parts(model), model):
            fully_shard(part, reshard_after_forward=not keep, **options)
        return model

    return wrap


def blocks(model: Any) -> Iterable[nn.Module]:
    return model.blocks


def layers(model: Any) -> Iterable[nn.Module]:
    """Each for itself: a normalisation is scattered again when the linear layer behind it wants its output."""
    return [part for part in model.modules() if isinstance(part, (nn.Linear, nn.LayerNorm, nn.Conv2d))]


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS: dict[str, Shard] = {
    "ddp": ddp(),
    "static graph": ddp(static_graph=True),
    "find unused": ddp(find_unused_parameters=True),
    "bucket view": ddp(gradient_as_bucket_view=True),
    "fp16 hook": ddp(lambda model: model.register_comm_hook(None, default_hooks.fp16_compress_hook)),
    "power sgd": ddp(use_power_sgd),
    "fsdp2": fsdp(blocks),
    "fsdp2 kept": fsdp(blocks, keep=True),
    "fsdp2 by layer": fsdp(layers),
    "fsdp2 bf16": fsdp(blocks, mp_policy=BF16),
    "fsdp1": lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
}


def one_step(wrap: Shard, bits: int | None, after: bool = False, repeat: int = 1) -> dict[str, Any]:
    """Loss, bytes and gradient of a step, the last of some; ``after``: converted when it is wrapped already."""
    model = net()
    if bits is not None and not after:
        hf_actnn.convert(model, bits=bits, min_numel=64)
    model = wrap(model)
    if bits is not None and after:
        hf_actnn.convert(model, bits=bits, min_numel=64)
    pixels, labels = mine(*batch())
    for _ in range(repeat):
        model.zero_grad()
        with hf_actnn.track_memory(model) as memory:
            loss = F.cross_entropy(model(pixels).float(), labels)
        loss.backward()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = gradient(model).clone()
    else:
        found = gradient(model)
    return {"loss": loss.item(), "saved": memory.saved_bytes, "raw": memory.uncompressed_bytes, "gradient": found}


def compare() -> dict[str, Any]:
    """Each way, plain and at 8 bits, with the gradient of the whole batch in one process."""
    exact = gradient(_trained(net()))
    found = {}
    for name, wrap in WAYS.items():
        repeat = 3 if name == "power sgd" else 1  # the hook begins to compress with the third step
        uncompressed = one_step(wrap, None, repeat=repeat)
        coded = {name: one_step(wrap, 8, repeat=repeat)}
        if name == "fsdp2":
            coded["fsdp2, converted after"] = one_step(wrap, 8, after=True)
        reference = uncompressed.pop("gradient")
        uncompressed["error"] = off(reference, exact)
        for key, one in coded.items():
            error = off(one.pop("gradient"), reference)
            found[key] = {**one, "error": error, "plain": uncompressed}
    return found


def noise() -> dict[str, float]:
    """How alike the errors are of two processes that see the same samples, of two seeds, and of one seed twice."""
    exact = gradient(_trained(net()))
    errors = [gradient(_trained(hf_actnn.convert(net(), bits=2, min_numel=64, seed=seed))) - exact for seed in (0, 1)]
    others = errors[0].clone()
    dist.all_reduce(others)
    others -= errors[0]
    again = gradient(_trained(hf_actnn.convert(net(), bits=2, min_numel=64))) - exact
    return {
        "processes": float(F.cosine_similarity(errors[0], others, dim=0)),
        "seeds": float(F.cosine_similarity(errors[0], errors[1], dim=0)),
        "again": float(F.cosine_similarity(errors[0], again, dim=0)),
    }


def _trained(model: nn.Module) -> nn.Module:
    pixels, labels = batch()
    F.cross_entropy(model(pixels), labels).backward()
    return model


def adapt(wrap: Shard, micro: int = 1, checkpoints: bool = False, **settings: Any) -> dict[str, Any]:
    """Some steps of training at a level that chooses bits."""
    model = net()
    model.checkpoints = checkpoints
    hf_actnn.convert(model, min_numel=64, update_interval=4, **settings)
    model = wrap(model)
    controller = hf_actnn.controller(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for step in range(9):
        pixels, labels = mine(*batch(step))
        for part in range(micro):
            last = part == micro - 1
            waits = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else None
            if not isinstance(model, DistributedDataParallel):
                model.set_requires_gradient_sync(last)  # type: ignore[operator]
            with waits or contextlib.nullcontext():
                loss = F.cross_entropy(model(pixels[part::micro]), labels[part::micro]) / micro
                loss.backward()
        controller.step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"history": controller.history, "bits": controller.bits(), "losses": losses}


def refused() -> dict[str, str]:
    """What is said where compressed activations do not work."""
    found = {}
    pixels, labels = mine(*batch())

    def note(name: str, step: Callable[[], Any]) -> None:
        try:
            step()
        except hf_actnn.errors.ActNNError as error:
            found[name] = f"{type(error).__name__}: {error}"

    flattened = FullyShardedDataParallel(
        hf_actnn.convert(net(), bits=2), use_orig_params=False, device_id=torch.device("cpu")
    )
    note("flattened", lambda: flattened(pixels))
    split = hf_actnn.convert(net(), bits=2, min_numel=64)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in split.blocks:
        parallelize_module(block, init_device_mesh("cpu", (2,)), plan)
    note("split", lambda: split(pixels))
    spread = hf_actnn.convert(TwoGroups(), bits=2, min_numel=64)
    for part in spread.children():
        fully_shard(part)
    fully_shard(spread)
    note("scattered", lambda: F.cross_entropy(spread(torch.randn(8, WIDTH)), labels).backward())
    return found


def reverted() -> bool:
    """Whether a model that was sharded after it was converted trains on as an uncompressed one."""
    model = fsdp(blocks)(hf_actnn.convert(net(), bits=2, min_numel=64))
    hf_actnn.revert(model)
    pixels, labels = mine(*batch())
    with hf_actnn.track_memory(model) as memory:
        F.cross_entropy(model(pixels), labels).backward()
    sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return sharded and not hf_actnn.is_converted(model) and memory.ratio == 1


def main() -> None:
    warnings.filterwarnings("ignore", message=".*view tensor.*")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "ways": compare(),
        "noise": noise(),
        "ddp": adapt(ddp(), level="L3"),
        "fsdp2": adapt(fsdp(blocks), level="L3"),
        "ddp auto": adapt(ddp(), bits="auto", micro=2),
        "fsdp2 auto": adapt(fsdp(blocks), bits="auto", micro=2),
        "fsdp2 checkpoints": adapt(fsdp(blocks), level="L3", bits=2.5, checkpoints=True),
        "reverted": reverted(),
        "refused": refused(),
    }
    with open(sys.argv[1] + f"/{dist.get_rank()}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
