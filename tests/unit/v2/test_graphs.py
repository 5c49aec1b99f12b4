"""Full CUDA graphs on Model Runner V2: `auto` has one for each width of rows, by vLLM's own manager."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support import tiny
from vllm_idlm import engine_args
from vllm_idlm.settings import ISDSettings
from vllm_idlm.v2.graphs import captured, choices

SIZES = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]  # vLLM's default


def manager(config, sizes=SIZES):
    """vLLM's manager as it is before it captures; its constructor wants a GPU."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    made = object.__new__(CudaGraphManager)
    sizes = SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=sizes[-1])
    made.__dict__ |= {
        "vllm_config": config,
        "compilation_config": sizes,
        "cudagraph_mode": config.compilation_config.cudagraph_mode,
        "max_num_reqs": config.scheduler_config.max_num_seqs,
        "decode_query_len": 1 + config.speculative_config.num_speculative_tokens,
        "lora_capture_cases": [0, 1],
        "_lora_dispatch_map": {1: 1},
        "_max_lora_case": 1,
        "varlen_decode": False,
        "ubatch_runner": None,
        "_candidates": {},
        "_capture_descs": {},
    }
    made._init_candidates()
    made._graphs_captured = True
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.write_tiny(tmp_path_factory.mktemp("graphs") / "model", vocab=48))


@pytest.fixture
def config(folder):
    """The VllmConfig of an engine as on a GPU, by its settings and requests at most; the default mode is vLLM's."""
    from vllm import EngineArgs
    from vllm.config import CUDAGraphMode

    def made(requests, mode=CUDAGraphMode.FULL_AND_PIECEWISE, **settings):
        isd = {"method": "isd", "n": 4, "mask_token_id": 1, **settings}
        asked = EngineArgs(folder, speculative_config=isd, skip_tokenizer_init=True, max_num_seqs=requests)
        found = asked.create_engine_config()
        engine_args.fit_v2(found)
        found.compilation_config.cudagraph_mode = mode
        return found

    return made


def _room(requests, slots):
    """The largest batch that a graph is captured for: a capture size, or all requests, within the largest size."""
    return max(r for r in {*SIZES, requests} if r <= requests and r * (1 + slots) <= SIZES[-1])


@pytest.mark.parametrize("requests", [1, 4, 16, 100, 256])
def test_every_width_has_a_full_graph_for_every_batch(config, requests):
    from vllm.config import CUDAGraphMode

    found = config(requests)
    assert engine_args.of(found).coverage == "auto"
    assert captured(found) == {0, 2, 6, 15}
    graphs = manager(found)
    for slots in captured(found):
        for batch in range(1, _room(requests, slots) + 1):
            for loras in (0, 1):
                graph = graphs.dispatch(batch, batch * (1 + slots), 1 + slots, loras)
                assert graph.cg_mode == CUDAGraphMode.FULL, (slots, batch)
                assert graph.num_tokens == graph.num_reqs * (1 + slots)
                assert graph.num_active_loras == loras
                own = [g for g in graphs._capture_descs[CUDAGraphMode.FULL] if g.uniform_token_count == 1 + slots]
                assert graph.num_reqs == min(g.num_reqs for g in own if g.num_reqs >= batch)
    sizes = [g.num_tokens for g in graphs._capture_descs[CUDAGraphMode.FULL]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(graphs._capture_descs[CUDAGraphMode.FULL])) == len(sizes) < 250
    mixed = graphs.dispatch(2, 40, None, 0)
    assert mixed.cg_mode == CUDAGraphMode.PIECEWISE


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_small_capture_sizes_have_the_widths_that_fit(config, mode):
    """vLLM itself captures nothing there: the widest row is wider than the largest size."""
    from vllm.config import CUDAGraphMode

    graphs = manager(config(16, CUDAGraphMode[mode]), [1, 2, 4, 8])
    for batch, rows in [(1, 1), (8, 1), (1, 3), (2, 3), (1, 7)]:
        assert graphs.dispatch(batch, batch * rows, rows, 0).cg_mode == CUDAGraphMode.FULL, (batch, rows)
    assert graphs.dispatch(1, 16, 16, 0).cg_mode == CUDAGraphMode.NONE


def test_with_a_draft_adapter_nothing_is_captured_without(config):
    from vllm.config import CUDAGraphMode

    found = config(16)
    found.additional_config["isd"]["lora"] = "adapter"
    ours = [g for g in manager(found)._capture_descs[CUDAGraphMode.FULL] if g.uniform_token_count != 16]
    assert {g.uniform_token_count for g in ours} == {1, 3, 7}
    assert all(g.num_active_loras for g in ours)


def test_a_users_schedule_is_found_too(config):
    from vllm.config import CUDAGraphMode

    found = config(64, coverage="last", schedule=[[1, 8, 4], [9, None, 2]])
    graphs = manager(found)
    for batch, slots in [(1, 6), (3, 6), (8, 6), (9, 2), (12, 2), (13, 2), (63, 2)]:
        assert graphs.dispatch(batch, batch * (1 + slots), 1 + slots, 0).cg_mode == CUDAGraphMode.FULL, (batch, slots)


def test_without_full_graphs_rows_may_have_any_width(config):
    from vllm.config import CUDAGraphMode

    for mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE):
        found = config(16, mode)
        assert captured(found) == frozenset()
        assert found.speculative_config.num_speculative_tokens_per_batch_size is None
        assert found.speculative_config.num_speculative_tokens == 15


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        ({"n": 2}, {3, 2, 0}),
        ({"n": 4}, {15, 6, 2, 0}),
        ({"n": 4, "schedule": [[1, 8, 4], [9, None, 1]]}, {15, 6, 2, 0}),
        ({"n": 6, "schedule": [[1, None, 3]]}, {4, 2, 0}),
        ({"n": 4, "schedule": [[1, None, 1]]}, {0}),
    ],
)
def test_widths(settings, widths):
    assert choices(ISDSettings(coverage="auto", mask_token_id=1, **settings)) == widths


def test_ranks_that_must_agree_have_last(config):
    """Data parallelism, an external launcher: each rank has a scheduler of its own."""
    found = config(4)
    for name, value in (("data_parallel_size", 2), ("distributed_executor_backend", "external_launcher")):
        kept = getattr(found.parallel_config, name)
        setattr(found.parallel_config, name, value)
        assert engine_args._fit_coverage(found, engine_args.of(found)).coverage == "last"
        setattr(found.parallel_config, name, kept)
