"""The vLLM path against the transformers-level reference, forward by forward: drafts, masks, accepted, emitted."""

from __future__ import annotations

import pytest
from vllm_idlm.proposers.reference import GatedLoRA, decode

from tests.support import tiny
from tests.support.engines import engine, isd, proposer, stats
from vllm_idlm.engine_args import DRAFT_LORA_ID

pytestmark = pytest.mark.vllm
PROMPTS = [[3, 7, 11, 2], [5, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8], [13], [40, 2, 40, 2, 40]]
LENGTH = 30
FORMS = [(2, "last"), (4, "last"), (8, "last"), (2, "all"), (3, [1]), (4, "all"), (4, [2, 0]), (6, "all")]
PLAIN = [(4, "last"), (4, "all")]  # without an adapter, in a short run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("forwards")
    model = tiny.write_tiny(root / "model", vocab=48)
    return str(model), str(tiny.write_adapter(root / "draft", model, scale=0.5))


@pytest.mark.parametrize(
    ("n", "coverage", "gated"),
    [
        *((n, coverage, True) for n, coverage in FORMS),
        *(pytest.param(n, c, False, marks=() if (n, c) in PLAIN else pytest.mark.slow) for n, c in FORMS),
    ],
    ids=lambda value: {True: "gated", False: "full"}[value] if isinstance(value, bool) else str(value),
)
def test_each_forward_equals_the_reference(folders, n, coverage, gated):
    from vllm import SamplingParams, TokensPrompt

    path, adapter = folders
    settings = {"mask_token_id": 1, "coverage": coverage, **({"lora": adapter} if gated else {})}
    groups = coverage if isinstance(coverage, list) else range(n - 1) if coverage == "all" else ()
    options = {"skip_tokenizer_init": True, "max_model_len": 128}
    llm = engine(path, speculative_config=isd(n, **settings), **options)
    llm.collective_rpc("isd_trace", args=(True,))
    stats(llm)
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in PROMPTS], params, use_tqdm=False)
    trace = stats(llm)["trace"]
    model = tiny.load_tiny(path)
    lora = GatedLoRA(model, adapter) if gated else None
    accepted = 0
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        want = decode(model, prompt, n=n, mask_token_id=1, max_tokens=LENGTH, lora=lora, groups=groups)
        got = next(t for request, t in trace.items() if request.split("-")[0] == output.request_id)
        assert [f["drafts"] for f in got] == [list(f.drafts) for f in want.forwards]
        assert [(f["masks"], f["accepted"]) for f in got] == [(f.masks, f.accepted) for f in want.forwards]
        assert [f.get("extra", []) for f in got] == [[list(g) for g in f.extra] for f in want.forwards]
        assert [f["tokens"] for f in got] == [list(f.emitted) for f in want.forwards]
        assert list(output.outputs[0].token_ids) == want.tokens
        accepted += sum(f.accepted for f in want.forwards)
    assert accepted > 0, "no draft was ever accepted: the comparison saw one half of the algorithm"


def test_the_draft_adapter_stays(folders):
    """vLLM's Model Runner V1 drops all adapters at the end of its captures (on GPUs)."""
    draft = proposer(engine(folders[0], speculative_config=isd(4, mask_token_id=1, lora=folders[1]), max_num_seqs=3,
                            max_model_len=128, skip_tokenizer_init=True))  # fmt: skip
    runner = draft.runner
    manager = runner.lora_manager._adapter_manager
    runner.maybe_remove_all_loras(runner.lora_config)
    assert runner.list_loras() == set()
    draft.warm_up()
    assert runner.list_loras() == {DRAFT_LORA_ID}
    assert DRAFT_LORA_ID in manager._registered_adapters.pinned_items & manager._active_adapters.pinned_items
