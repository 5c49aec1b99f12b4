"""The compiled row-selecting LoRA against its oracle."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from vllm_idlm.kernels import lora
from vllm_idlm.kernels.lora import cpu, naive

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = {  # in, widths of the output's slices, rank
    "qkv": (576, (576, 192, 192), 32),
    "gate_up": (576, (1536, 1536), 32),
    "down": (1536, (576,), 16),
    "odd": (33, (17, 5), 8),
    "rank1": (100, (40,), 1),
    "rank70": (64, (48, 16), 70),
}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert lora.load() == "compiled", "the tests of the compiled op need a C++ compiler: install g++"


def make(shape: str, rows: int, dtype: torch.dtype, slots: int = 1, seed: int = 0):
    """y, x, slots (longer than the rows, as vLLM's buffer is), A, B, widths."""
    rng = torch.Generator().manual_seed(seed)
    inputs, widths, rank = SHAPES[shape]

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=rng).to(dtype)

    a = [normal(slots, 1, rank, inputs) * inputs**-0.5 for _ in widths]
    b = [normal(slots, 1, width, rank) * rank**-0.5 for width in widths]
    chosen = torch.randint(-1, slots, (rows + 3,), generator=rng)
    return normal(rows, sum(widths)), normal(rows, inputs), chosen, a, b, list(widths)


def both(y, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    got, want = y.clone(), y.clone()
    lora.add_lora_rows(got, *rest)
    naive.add_lora_rows(want, *rest)
    return got, want


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within float32's summation error, or one rounding step of bfloat16."""
    relative, absolute = (1e-5, 1e-5) if got.dtype == F32 else (2**-7, 1e-3)
    torch.testing.assert_close(got.float(), want.float(), rtol=relative, atol=absolute)


@pytest.mark.parametrize("slots", [1, 2, 3], ids="slots{}".format)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(shape, dtype, slots):
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 64, 130):
        y, x, chosen, *rest = make(shape, rows, dtype, slots, seed=rows)
        got, want = both(y, x, chosen, *rest)
        assert_close(got, want)
        clean = chosen[:rows] < 0
        assert torch.equal(got[clean], y[clean]), "a row without an adapter was changed"
        assert not torch.equal(got, y) or bool(clean.all())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_others(dtype):
    y, x, _, a, b, widths = make("qkv", 40, dtype, slots=2)
    slots = torch.arange(40) % 3 - 1
    together = y.clone()
    lora.add_lora_rows(together, x, slots, a, b, widths)
    for row in range(40):
        alone = y[row : row + 1].clone()
        lora.add_lora_rows(alone, x[row : row + 1], slots[row : row + 1], a, b, widths)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("threads", [1, 2, 3], ids="threads{}".format)
def test_the_number_of_threads_changes_nothing(threads):
    before = torch.get_num_threads()
    y, x, _, *rest = make("gate_up", 7, BF16)
    slots = torch.tensor([-1, -1, 0, 0, 0, -1, -1])
    want = y.clone()
    try:
        torch.set_num_threads(1)
        lora.add_lora_rows(want, x, slots, *rest)
        torch.set_num_threads(threads)
        lora.add_lora_rows(y, x, slots, *rest)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, want)


def test_no_row_with_an_adapter_is_no_change():
    y, x, _, *rest = make("qkv", 5, BF16)
    before = y.clone()
    lora.add_lora_rows(y, x, torch.full((9,), -1), *rest)
    assert torch.equal(y, before)


def test_rows_of_a_wider_tensor_and_columns_beyond_the_slices():
    y, x, slots, a, b, widths = make("odd", 6, BF16)
    wide_y, wide_x = torch.zeros(6, 40, dtype=BF16), torch.zeros(6, 50, dtype=BF16)
    wide_y[:, : y.shape[1]], wide_x[:, : x.shape[1]] = y, x
    got, want = both(y, x, slots, a, b, widths)
    lora.add_lora_rows(wide_y, wide_x[:, : x.shape[1]], slots, a, b, widths)
    assert torch.equal(wide_y[:, : y.shape[1]], got)
    assert not wide_y[:, y.shape[1] :].any()
    assert_close(got, want)


def test_rounding_of_bfloat16_is_torchs():
    """A = [1], B = [1]: y becomes y + x, rounded once; ties, infinities and NaN as torch does it."""
    x = torch.tensor([[1.0], [2**-8], [3 * 2**-9], [float("inf")], [float("nan")], [-(2**-8)], [3e38]], dtype=BF16)
    y = torch.tensor([[2**-8], [1.0], [1.0], [1.0], [1.0], [1.0], [3e38]], dtype=BF16)
    one = [torch.ones(1, 1, 1, 1, dtype=BF16)]
    got = y.clone()
    lora.add_lora_rows(got, x, torch.zeros(7, dtype=torch.long), one, one, [1])
    torch.testing.assert_close(got, (y.float() + x.float()).to(BF16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"slots": torch.full((4,), 7)}, "slots"),
        ({"slots": torch.zeros(2, dtype=torch.long)}, "slots"),
        ({"x": torch.zeros(4, 33)}, "BFloat16"),
        ({"x": torch.zeros(4, 20, dtype=BF16)}, "n, 33"),
        ({"widths": [18, 5]}, ">= 23"),
        ({"widths": [16, 5]}, "slice 0"),
    ],
    ids=["slot-too-large", "slots-too-few", "dtype", "in", "y-too-narrow", "slice-too-narrow"],
)
def test_wrong_arguments_are_refused(change, says):
    y, x, slots, a, b, widths = make("odd", 4, BF16)
    given = {"x": x, "slots": torch.zeros_like(slots), "widths": widths, **change}
    with pytest.raises(RuntimeError, match=says):
        lora.add_lora_rows(y, given["x"], given["slots"], a, b, given["widths"])


def test_torch_compile_traces_it_and_reads_new_slots():
    _, _, _, a, b, widths = make("qkv", 1, F32)
    weight = torch.randn(sum(widths), 576) * 0.05
    slots = torch.full((64,), -1)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight)
        torch.ops.vllm_idlm.add_lora_rows_(y, x, slots, a, b, widths)
        return torch.tanh(y)

    fast = torch.compile(layer, dynamic=True, fullgraph=True)
    for rows, masks in ((7, slice(4, 7)), (5, slice(0, 0)), (9, slice(1, 8))):
        slots.fill_(-1)
        slots[masks] = 0
        x = torch.randn(rows, 576)
        torch.testing.assert_close(fast(x), layer(x))


@pytest.mark.heavy
def test_without_a_compiler_the_plain_form_serves(tmp_path):
    """In a fresh process: a warning that names the fix, and the same op, computed by the oracle."""
    code = (
        "import torch, logging; logging.basicConfig()\n"
        "from vllm_idlm.kernels import lora\n"
        "print(lora.load())\n"
        "y = torch.zeros(2, 3); w = [torch.ones(1, 1, 2, 2)], [torch.ones(1, 1, 3, 2)]\n"
        "lora.add_lora_rows(y, torch.ones(2, 2), torch.tensor([-1, 0]), *w, [3]); print(y.tolist())"
    )
    env = {"PATH": str(tmp_path), "VLLM_IDLM_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["naive", "[[0.0, 0.0, 0.0], [4.0, 4.0, 4.0]]"]
    assert "install g++" in ran.stderr


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["qkv", "odd", "rank70"])
def test_layers_of_a_table_are_the_same_op(shape, dtype):
    """The second row of a table, weights written afterwards as vLLM writes an adapter, traced by torch.compile."""
    ops = torch.ops.vllm_idlm
    y, x, chosen, a, b, widths = make(shape, 9, dtype, slots=2)
    stored = [torch.zeros_like(w.transpose(-1, -2)).contiguous().transpose(-1, -2) for w in b]
    other = torch.zeros(2, 1, 4, 8, dtype=dtype), torch.zeros(2, 1, 4, 6, dtype=dtype).transpose(-1, -2)
    table = cpu.table([ops.lora_layer([other[0]], [other[1]], [6]), ops.lora_layer(a, stored, widths)])
    for into, weight in zip(stored, b, strict=True):
        into[:, 0, : weight.shape[2]].copy_(weight[:, 0])
    want = y.clone()
    lora.add_lora_rows(want, x, chosen, a, b, widths)
    call = torch.compile(lambda y, x: ops.add_lora_layer_(y, x, chosen, table, 1), fullgraph=True)
    call(y, x)
    assert torch.equal(y, want)
    with pytest.raises(RuntimeError, match="index into it"):
        ops.add_lora_layer_(y, x, chosen, table, 2)
    with pytest.raises(RuntimeError, match="transposed"):
        ops.lora_layer(a, b, widths)


def test_padded_ranks_change_nothing():
    """vLLM pads ranks with zeros up to max_lora_rank."""
    y, x, chosen, a, b, widths = make("qkv", 9, BF16)
    padded = [torch.nn.functional.pad(w, (0, 0, 0, 32)) for w in a], [torch.nn.functional.pad(w, (0, 32)) for w in b]
    want = y.clone()
    lora.add_lora_rows(want, x, chosen, a, b, widths)
    lora.add_lora_rows(y, x, chosen, *padded, widths)
    assert torch.equal(y, want)
