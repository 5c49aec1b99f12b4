"""Products of rows with a weight on CPUs: our kernel against plain torch."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels import linear
from vllm_idlm.kernels.linear import naive

DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(scope="module", autouse=True)
def built():
    linear.load()


def make(rows, out, into, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=draw) * into**-0.5
    return (
        torch.randn(rows, into, generator=draw).to(dtype),
        weight.to(dtype),
        torch.randn(out, generator=draw).to(dtype),
    )


def close(found, x, weight, bias=None):
    wanted = naive.linear(x, weight, bias)
    bound = {"atol": 5e-6, "rtol": 1e-5} if x.dtype is torch.float32 else {"atol": 1e-6, "rtol": 2**-7}
    if x.dtype is torch.bfloat16:  # rounded once: one step off where float32 sums fall on the other side of a tie
        assert (found != wanted).float().mean() < 0.01
    torch.testing.assert_close(found, wanted, **bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 16, 33, 127, 128, 129, 300])
def test_rows(rows, dtype):
    x, weight, bias = make(rows, 96, 192, dtype)
    close(linear.linear(x, weight), x, weight)
    close(linear.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [1, 3, 4, 15, 16, 17, 63, 65, 1000])
@pytest.mark.parametrize("into", [32, 64, 576, 1536])
def test_shapes_of_the_weight(out, into, dtype):
    x, weight, _ = make(6, out, into, dtype)
    close(linear.linear(x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(dtype):
    """To the bit, whatever the number of rows and wherever in the batch it stands."""
    x, weight, bias = make(140, 200, 256, dtype)
    alone = torch.cat([linear.linear(row[None], weight, bias) for row in x])
    for rows in (2, 3, 5, 16, 131, 140):
        assert torch.equal(linear.linear(x[:rows], weight, bias), alone[:rows])
        assert torch.equal(linear.linear(x[-rows:], weight, bias), alone[-rows:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_stride_and_more_dimensions(dtype):
    x, weight, _ = make(12, 40, 64, dtype)
    wide = torch.cat([x, x + 1], dim=1)
    assert torch.equal(linear.linear(wide[:, :64], weight), linear.linear(x, weight))
    assert torch.equal(linear.linear(x.t().contiguous().t(), weight), linear.linear(x, weight))
    assert torch.equal(linear.linear(x.view(3, 4, 64), weight), linear.linear(x, weight).view(3, 4, 40))
    assert linear.linear(x[:0], weight).shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_finds_the_op_well_made(dtype):
    """Its schema, the shapes it tells torch.compile, and what compiled code makes of it."""
    x, weight, bias = make(3, 20, 64, dtype)
    torch.library.opcheck(torch.ops.vllm_idlm.linear.default, (x, weight, bias))


def test_numbers_that_are_none():
    x, weight, _ = make(3, 20, 64, torch.bfloat16)
    x[1, 5] = float("nan")
    x[2, 7] = float("inf")
    found = linear.linear(x, weight)
    assert found[1].isnan().all()
    assert torch.equal(found[2], naive.linear(x, weight)[2])
    assert not found[0].isnan().any()


def test_what_it_does_not_take_is_told_before_and_refused_after():
    x, weight, bias = make(2, 16, 48, torch.bfloat16)
    assert not linear.fits(weight), "48 bfloat16 are no whole vectors"
    assert linear.fits(weight.float())
    for other in (weight.half(), weight.float().t(), weight.float()[None], weight.float()[:0]):
        assert not linear.fits(other)
    with pytest.raises(RuntimeError, match="in a multiple of 32"):
        linear.linear(x, weight)
    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        linear.linear(x.half(), weight.half())
    with pytest.raises(RuntimeError, match="bias"):
        linear.linear(x.float(), weight.float(), bias)


@pytest.mark.heavy
def test_the_compiler_takes_it_as_it_is():
    x, weight, bias = make(5, 32, 64, torch.float32)
    options = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}  # a graph of any sizes, no code of it
    compiled = torch.compile(lambda x: linear.linear(x * 2, weight, bias) + 1, **options)
    torch.testing.assert_close(compiled(x), linear.linear(x * 2, weight, bias) + 1)
