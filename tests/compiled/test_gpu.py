"""torch.compile of converted models on a GPU: what goes across is coded, and gradients are right."""

import copy

import pytest
import torch
import torch.nn.functional as F

import hf_actnn
from hf_actnn.codec import native
from tests.compiled.test_compiled import MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning:torch")]


@pytest.fixture(autouse=True)
def fresh():
    if native.cuda(0) is None:
        pytest.skip("the CUDA kernels are not built")
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def step(model, x, labels):
    """Loss, gradient, and bytes that the forward pass leaves behind."""
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = F.cross_entropy(model(x), labels)
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return float(loss), torch.cat([one.grad.flatten() for one in model.parameters()]), held


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model(name, mode):
    torch.manual_seed(0)
    kind, shape = MODELS[name]
    made = kind().cuda().train()
    x, labels = torch.randn(64, *shape[1:], device="cuda"), torch.randint(0, 10, (64,), device="cuda")
    loss, exact, _ = step(copy.deepcopy(made), x, labels)
    found = {}
    for bits in (None, 8):
        model = copy.deepcopy(made)
        if bits:
            hf_actnn.convert(model, "L2", bits=bits, min_numel=1)
        compiled = torch.compile(model, mode=mode)
        for _ in range(3):  # CUDA graphs are warmed up, recorded and replayed
            torch.compiler.cudagraph_mark_step_begin()
            found[bits] = step(compiled, x, labels)
    for other in found.values():
        assert other[0] == pytest.approx(loss, rel=1e-3)
    assert float((found[None][1] - exact).norm() / exact.norm()) < 5e-3
    assert float((found[8][1] - exact).norm() / exact.norm()) < 3e-2
    if mode == "default":
        assert found[8][2] < 0.7 * found[None][2], found
