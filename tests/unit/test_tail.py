"""Extra mask rows: where the host and the device lay them out, and where they are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm_idlm.kernels.tail import naive, tail_attention
from vllm_idlm.proposers.state import Row

from tests.unit.kernels.test_tail import close
from vllm_idlm import tail
from vllm_idlm.settings import SettingsError
from vllm_idlm.tail import DevicePlan, TailAttention, check_engine, places, plan, views

MASKS, GROUPS, ROOM = 3, (2, 0), 4
WIDTH = 1 + 2 * MASKS + len(GROUPS) * MASKS
FULL = Row((), 2 * MASKS, None, tuple((j, MASKS) for j in GROUPS))


def lay(device_plan, rows, computed, pad=0):
    """Begin a step of requests with so many rows each; returns its positions, numbered on as vLLM does."""
    start = np.concatenate([[0], np.cumsum(rows)])
    positions = np.concatenate([c + np.arange(r) for c, r in zip(computed, rows, strict=True)] + [np.zeros(pad)])
    positions = torch.from_numpy(positions.astype(np.int64))
    begun = [torch.from_numpy(np.asarray(x).astype(np.int32)) for x in (start, rows)]
    device_plan.begin(*begun, torch.tensor(computed, dtype=torch.int64), positions)
    return positions


def table(requests=ROOM, blocks=8):
    return torch.arange(requests * blocks, dtype=torch.int32).view(requests, blocks)


def test_places_of_extra_rows():
    """x d1 d2 M M | G0: M M | G1: M: two requests, at rows 0 and 20 of the step, with 100 and 7 tokens in the cache."""
    row, position, visible, first = places(5, ((0, 2), (1, 1)))
    assert row.tolist() == [5, 6, 7]
    assert position.tolist() == [1, 2, 2]
    assert visible.tolist() == [1, 1, 2]
    assert first.tolist() == [5, 5, 7]
    rows = [Row([1, 2], 2, None, ((0, 2), (1, 1))), Row([1], 2), Row([1, 2], 2, None, ((1, 2),))]
    found = plan(rows, np.array([0, 8, 20]), np.array([100, 50, 7]))
    assert found.requests.tolist() == [0, 2]
    assert found.starts.tolist() == [0, 3, 5]
    assert found.fields.tolist() == [
        [5, 6, 7, 25, 26],
        [101, 101, 102, 9, 9],
        [105, 105, 107, 12, 12],
        [106, 107, 108, 13, 14],
    ]
    assert found.positions.tolist() == [101, 102, 102, 9, 10]
    assert plan(rows[1:2], np.array([0]), np.array([50])) is None


def test_whole_rows_are_what_the_host_lays_out():
    """The row of Model Runner V1 with no drafts, all causal slots masks, has the same places."""
    device_plan, computed = DevicePlan(MASKS, GROUPS, ROOM, torch.device("cpu")), [40, 0, 7]
    positions = lay(device_plan, [WIDTH] * 3, computed)
    found = device_plan.tail(table(3))
    wanted = plan([FULL] * 3, np.arange(3) * WIDTH, np.array(computed))
    assert found.rows.tolist() == wanted.fields.tolist()
    assert found.starts.tolist() == wanted.starts.tolist()
    assert found.most == wanted.counts.max()
    assert positions[found.rows[0].long()].tolist() == wanted.positions.tolist()
    causal = places(1 + 2 * MASKS, FULL.extra).row[0]
    assert positions[:causal].tolist() == list(range(40, 40 + causal))


def test_a_graph_finds_the_rows_of_every_later_step_where_it_was_captured():
    """Captured with room for four: steps of one to four requests, with narrow rows and a prompt among them."""
    device_plan, generator = DevicePlan(MASKS, GROUPS, ROOM, torch.device("cpu")), torch.Generator().manual_seed(0)
    captured = device_plan.empty(table())
    assert (captured.rows[0] == -1).all()
    cache = views(torch.randn(ROOM * 8, 2, 32, 2 * 16, generator=generator))
    for rows in ([WIDTH], [WIDTH] * 4, [WIDTH, 7, WIDTH], [0, WIDTH], [3, 1], []):
        computed = [30 + 9 * i for i in range(len(rows))]
        lay(device_plan, rows, computed, pad=5)
        stepwise = device_plan.tail(table())
        assert stepwise.rows.data_ptr() == captured.rows.data_ptr()
        assert stepwise.starts.data_ptr() == captured.starts.data_ptr()
        query = torch.randn(ROOM * WIDTH, 4, 16, generator=generator)
        found, wanted = torch.full_like(query, 7.0), torch.full_like(query, 7.0)
        tail_attention(found, query, *cache, captured, 0.25)
        whole = [i for i, count in enumerate(rows) if count == WIDTH]
        if whole:
            given = [FULL if i in whole else Row() for i in range(len(rows))]
            host = plan(given, np.cumsum(rows) - rows, np.array(computed))
            naive.tail_attention(wanted, query, *cache, host.tail(table()), 0.25)
        close(found, wanted, torch.float32)
        device_plan.end()
    captured = device_plan.empty(table())
    tail_attention(found := torch.full_like(query, 7.0), query, *cache, captured, 0.25)
    assert (found == 7.0).all(), "a replay without a step must write nothing"


class Builder:
    """A metadata builder of vLLM, as far as the hooks see it."""

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return SimpleNamespace()

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)


@pytest.mark.parametrize(("query", "there"), [(1, False), (1 + 2 * MASKS, False), (WIDTH, True), (512, True)])
def test_graphs_of_rows_wide_enough_have_the_kernel(query, there):
    device_plan, builder = DevicePlan(MASKS, GROUPS, ROOM, torch.device("cpu")), Builder()
    config = engine_config(None)
    group = SimpleNamespace(layer_names=[], metadata_builders=[builder])
    TailAttention(device_plan).attach(SimpleNamespace(vllm_config=config, device="cpu", attn_groups=[[group]]))
    common = SimpleNamespace(block_table_tensor=table(2), max_query_len=query)
    assert hasattr(builder.build_for_cudagraph_capture(common), "isd_tail") is there


def engine_config(mode, ubatching=False):
    """A VllmConfig as far as `check_engine` reads it."""
    compilation = SimpleNamespace(cudagraph_mode=mode, static_forward_context={})
    parallel = SimpleNamespace(decode_context_parallel_size=1, use_ubatching=ubatching)
    model = SimpleNamespace(uses_mrope=False, model="m")
    return SimpleNamespace(model_config=model, parallel_config=parallel, compilation_config=compilation)


def test_full_graphs_are_refused_where_the_plan_is_the_hosts():
    """As they are by then: vLLM settles its mode after the settings were read."""
    from vllm.config import CUDAGraphMode

    cuda, full = torch.device("cuda"), engine_config(CUDAGraphMode.FULL_AND_PIECEWISE)
    for mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE):
        check_engine(engine_config(mode), cuda)
    with pytest.raises(SettingsError, match=r"full CUDA graphs of Model Runner V1 .*PIECEWISE"):
        check_engine(full, cuda)
    check_engine(full, cuda, in_graphs=True)
    with pytest.raises(SettingsError, match="microbatches"):
        check_engine(engine_config(CUDAGraphMode.NONE, ubatching=True), cuda, in_graphs=True)


def layer(**changes):
    """A layer of vLLM's class Attention, with what `check` reads, and the changes in its `impl`."""
    from vllm.model_executor.layers.attention import Attention

    made = object.__new__(Attention)
    plain = {"sliding_window": -1, "alibi_slopes": None, "logits_soft_cap": 0, "sinks": None, "kv_cache_dtype": "auto"}
    object.__setattr__(made, "__dict__", {"impl": SimpleNamespace(**{**plain, **changes})})
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sliding_window": 4096}, "a sliding window"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap"),
        ({"sinks": object()}, "attention sinks"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8'"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "shared between layers"),
    ],
)
def test_attention_with_more_to_it_is_refused(changes, says):
    tail.check("layers.1", layer())
    tail.check("layers.1", layer(sliding_window=(-1, -1)))
    with pytest.raises(SettingsError, match=says) as refused:
        tail.check("layers.1", layer(**changes))
    assert 'allowed is "last"' in str(refused.value)
    assert "layers.1" in str(refused.value)


def test_another_kind_of_layer_is_refused():
    with pytest.raises(SettingsError, match="attention of class SimpleNamespace"):
        tail.check("layers.1", SimpleNamespace(impl=layer().impl))
