"""The tests of the kernels fail where a kernel is wrong: each mutation here breaks one thing on purpose."""

import shutil

import pytest
import torch

from tests.cuda import shim
from tests.cuda.test_backward_on_cpu import check_activations
from tests.cuda.test_on_cpu import check, sample
from tests.cuda.test_rebuild_on_cpu import check_by_channel, check_by_row


def values(row_length: int) -> torch.Tensor:
    return sample(row_length * 37, torch.float32, 1)


def unaligned(kernels) -> None:
    kernels.offset = 1
    check(kernels, values(256), 2, 256, 256)


def backwards(kernels) -> None:
    kernels.order = "backwards"
    check(kernels, values(64), 2, 64, 256)


# name: file, what stands there, what is put there, whether a sanitizer has to notice, the check that must fail
MUTATIONS = {
    "a shuffle": (
        "device.cuh",
        "__shfl_xor_sync(0xFFFFFFFFu, r.hi, offset)",
        "__shfl_xor_sync(0xFFFFFFFFu, r.hi, offset ^ 1)",
        False,
        lambda kernels: check(kernels, values(256), 2, 256, 256),
    ),
    "a bound": (
        "quantize.cu",
        "const bool mine = wanted < groups.at.n_groups;",
        "const bool mine = wanted <= groups.at.n_groups;",
        True,
        lambda kernels: check(kernels, values(256), 2, 256, 256),
    ),
    "a seed": (
        "quantize.cu",
        "keys(philox_keys(draw.seed))",
        "keys(philox_keys(draw.seed + 1))",
        False,
        lambda kernels: check(kernels, values(256), 2, 256, 256),
    ),
    "a barrier": (
        "quantize.cu",
        "    __syncwarp();\n    if (mine)",
        "    if (mine)",
        False,
        backwards,
    ),
    "a test of alignment": (
        "quantize.cu",
        "if (even(groups) && aligned(x, 16) && aligned(codes, 16))",
        "if (even(groups))",
        True,
        unaligned,
    ),
    "a gradient's run": (
        "dequantize.cuh",
        "next = use.ahead(first + (m + 1) * Lanes);",
        "next = use.ahead(first + m * Lanes);",
        False,
        lambda kernels: check_activations(kernels, values(256), 2, 256),
    ),
    "a channel": (
        "rebuild.cu",
        "if (++in_run == where.inner.by) {",
        "if (++in_run > where.inner.by) {",
        False,
        lambda kernels: check_by_channel(kernels, values(256), 2, 256, 256, 5, 3),
    ),
    "a quotient": (
        "rebuild.cu",
        "* magic >> 32) + n) >> shift",
        "* magic >> 32)) >> shift",
        False,
        lambda kernels: check_by_row(kernels, values(96), 2, 96, 256, 96),
    ),
    "a bit of a mask": (
        "rebuild.cu",
        "(8 * (i % 4) + e / 32) & 1u) != 0 ? on : off",
        "(8 * (i % 4) + e / 64) & 1u) != 0 ? on : off",
        False,
        lambda kernels: check_by_channel(kernels, values(256), 2, 256, 256, 4, 16),
    ),
    "a derivative": (
        "activations.cu",
        "return backward_of<kGeluTanh>(",
        "return backward_of<kGelu>(",
        False,
        lambda kernels: check_activations(kernels, values(256), 2, 256),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, tmp_path, objects):
    file, before, after, sanitize, examine = MUTATIONS[name]
    for folder in ("csrc", "tests/cuda"):
        shutil.copytree(shim.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "csrc" / "cuda" / file
    text = source.read_text()
    assert text.count(before) == 1, "the source has changed: put the mutation where it belongs now"
    source.write_text(text.replace(before, after))
    running = shim.Shim(shim.build(tmp_path / "build", tmp_path, sanitize, objects))
    with pytest.raises(RuntimeError if sanitize else AssertionError) as caught:
        examine(running)
    running.close()
    if sanitize:
        assert "AddressSanitizer" in str(caught.value) or "runtime error" in str(caught.value)
