"""Products of rows with a weight on CPUs: our kernel against plain torch, and the setting that chooses it."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels import linear, native
from vllm_idlm.kernels.linear import naive

from tests import tiny
from tests.engines import engine, isd, tokens
from vllm_idlm import cpu_linear
from vllm_idlm.settings import ISDSettings, SettingsError, of

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


def test_a_machine_without_a_compiler_keeps_vllms(monkeypatch):
    def fails():
        raise native.BuildError("no C++ compiler found")

    layer = torch.nn.Linear(64, 20, bias=False)
    monkeypatch.setattr(linear, "load", fails)
    assert not cpu_linear.take(layer)
    assert not hasattr(layer, "cpu_linear")
    monkeypatch.undo()
    assert cpu_linear.take(layer)
    assert not cpu_linear.take(torch.nn.Linear(60, 20, bias=False)), "not whole vectors"


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


def test_the_compiler_takes_it_as_it_is():
    x, weight, bias = make(5, 32, 64, torch.float32)
    compiled = torch.compile(lambda x: linear.linear(x * 2, weight, bias) + 1, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), linear.linear(x * 2, weight, bias) + 1)


def test_the_setting(monkeypatch):
    def resolved(asked, dtype, slow=True):
        monkeypatch.setattr(cpu_linear, "slow_at_bfloat16", lambda: slow)
        return cpu_linear.resolve(ISDSettings(cpu_linear=asked), dtype).cpu_linear

    assert resolved("auto", torch.bfloat16) == "rows"
    assert resolved("auto", torch.bfloat16, slow=False) == "vllm"
    assert resolved("auto", torch.float32) == "vllm"
    assert resolved("rows", torch.float32, slow=False) == "rows"
    assert resolved("vllm", torch.bfloat16) == "vllm"
    with pytest.raises(
        SettingsError, match=r'"cpu_linear": "rows" is for models in bfloat16 or float32 on CPUs; .*float16'
    ):
        resolved("rows", torch.float16)


def test_without_a_compiler_auto_is_vllms_and_rows_is_refused(monkeypatch):
    def fail():
        raise native.BuildError("no C++ compiler found")

    monkeypatch.setattr(linear, "load", fail)
    monkeypatch.setattr(cpu_linear, "slow_at_bfloat16", lambda: True)
    assert cpu_linear.resolve(ISDSettings(), torch.bfloat16).cpu_linear == "vllm"
    with pytest.raises(SettingsError, match=r'"cpu_linear": "rows": no C\+\+ compiler'):
        cpu_linear.resolve(ISDSettings(cpu_linear="rows"), torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.write_tiny(tmp_path_factory.mktemp("linear") / "model", vocab=48))


@pytest.mark.vllm
@pytest.mark.parametrize("asked", ["rows", "vllm"])
def test_an_engine_has_what_it_asked_for_and_the_same_text(folder, asked):
    """Every layer but what the kernel does not take; plain engines keep vLLM's."""
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=p) for p in ([3, 7, 11, 2], [5, 5, 9], [13])]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    options = {"skip_tokenizer_init": True, "max_model_len": 64}
    plain = engine(folder, **options)
    llm = engine(folder, speculative_config=isd(4, mask_token_id=1, coverage="all", cpu_linear=asked), **options)
    assert of(llm.llm_engine.vllm_config).cpu_linear == asked
    assert ours(llm) == (asked == "rows")
    assert not ours(plain)
    assert tokens(llm.generate(prompts, params, use_tqdm=False)) == tokens(
        plain.generate(prompts, params, use_tqdm=False)
    )


def ours(llm):
    """Whether the products are our kernel's, of all layers alike."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    found = {layer.cpu_linear is linear.linear for layer in model.modules() if hasattr(layer, "cpu_linear")}
    assert len(found) == 1
    return found.pop()
