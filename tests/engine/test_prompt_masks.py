"""Masks behind a prompt: who gets them, how many there is room for, and that blocks and budgets hold them."""

from __future__ import annotations

import pytest
from vllm_idlm.proposers.reference import GatedLoRA, decode

from tests.support import tiny
from tests.support.engines import engine, isd, stats

pytestmark = pytest.mark.vllm
N, MASK = 4, 1
PROMPT = [3, 7, 11, 2, 40, 2, 40, 2, 5, 5, 9, 1, 2, 3, 4, 6]  # 16 tokens, half a block of the cache


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    model = tiny.write_tiny(root / "model", vocab=48)
    return str(model), str(tiny.write_adapter(root / "draft", model, scale=0.5))


def _first_rows(llm, prompts, **options):
    """The forwards that each request's trace begins with, and the answers."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, "detokenize": False, **options})
    llm.collective_rpc("isd_trace", args=(True,))
    stats(llm)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
    trace = stats(llm)["trace"]
    rows = [next(t for name, t in trace.items() if name.split("-")[0] == o.request_id) for o in outputs]
    return rows, [list(o.outputs[0].token_ids) for o in outputs]


@pytest.mark.parametrize(
    ("options", "drafts"),
    [
        ({}, 3),
        ({"max_tokens": 4}, 2),
        ({"max_tokens": 2}, 0),
        ({"seed": 1, "temperature": 1.0}, 0),  # there is not room in any company, and noise must not depend on it
        ({"prompt_logprobs": 1}, 0),
        ({"extra_args": {"isd": False}}, 0),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_who_gets_drafts_for_the_first_decode_forward(folders, options, drafts):
    path, adapter = folders
    settings = {"block_size": 32, "max_model_len": 128, "skip_tokenizer_init": True}
    llm = engine(path, speculative_config=isd(N, mask_token_id=MASK, lora=adapter), **settings)
    rows, answers = _first_rows(llm, [PROMPT], **options)
    assert len(rows[0][0]["drafts"]) == drafts
    if "seed" not in options:
        model = tiny.load_tiny(path)
        want = decode(
            model,
            PROMPT,
            n=N if drafts else 1,
            mask_token_id=MASK,
            max_tokens=options.get("max_tokens", 12),
            lora=GatedLoRA(model, adapter),
        )
        assert answers == [want.tokens]
        if drafts:
            assert [tuple(row["drafts"]) for row in rows[0]] == [f.drafts for f in want.forwards]


def test_a_full_budget_leaves_fewer_masks(folders):
    """A step of 16 tokens: prompts that fill it have none, and one that is cut into chunks has what its end leaves."""
    path, _ = folders
    options = {"max_model_len": 128, "skip_tokenizer_init": True, "max_num_batched_tokens": 16, "max_num_seqs": 2}
    llm = engine(path, speculative_config=isd(N, mask_token_id=MASK), enable_prefix_caching=False, **options)
    model = tiny.load_tiny(path)
    for length, drafts in ((13, 3), (14, 2), (16, 0), (30, 2), (32, 0)):
        prompt = (PROMPT * 2)[:length]
        rows, answers = _first_rows(llm, [prompt])
        assert len(rows[0][0]["drafts"]) == drafts, length
        assert answers == [decode(model, prompt, n=1, mask_token_id=MASK, max_tokens=12).tokens]


def test_a_prompt_nearly_as_long_as_the_model_goes(folders):
    """Masks behind it stand within the model's length too."""
    path, _ = folders
    options = {"max_model_len": 64, "skip_tokenizer_init": True, "block_size": 32}
    llm = engine(path, speculative_config=isd(N, mask_token_id=MASK), **options)
    model = tiny.load_tiny(path)
    for length, drafts in ((58, 3), (61, 1), (62, 0)):
        prompt = (PROMPT * 4)[:length]
        rows, answers = _first_rows(llm, [prompt], max_tokens=None)
        assert [len(row[0]["drafts"]) for row in rows] == [drafts]
        assert answers == [decode(model, prompt, n=1, mask_token_id=MASK, max_tokens=64 - length).tokens]


def test_masks_in_a_block_of_their_own(folders):
    """A prompt that ends with a block, twice (the second time out of the prefix cache, but for its last block)."""
    path, adapter = folders
    settings = {"block_size": 32, "max_model_len": 128, "skip_tokenizer_init": True}
    llm = engine(path, speculative_config=isd(N, mask_token_id=MASK, lora=adapter, coverage="all"), **settings)
    model = tiny.load_tiny(path)
    prompts = [PROMPT * 4, PROMPT[:1], [*PROMPT * 2, 8]]
    for _ in range(2):
        rows, answers = _first_rows(llm, prompts)
        assert [len(row[0]["drafts"]) for row in rows] == [N - 1] * len(prompts)
        assert answers == [decode(model, p, n=1, mask_token_id=MASK, max_tokens=12).tokens for p in prompts]


def test_none_while_auto_decodes_plainly(folders):
    """Where nothing is drafted, masks behind a prompt would be rows for nothing."""
    from tests.support.engines import proposer, told

    path, adapter = folders
    speculative = isd(N, mask_token_id=MASK, lora=adapter, coverage="auto")
    llm = engine(path, speculative_config=speculative, max_model_len=128, skip_tokenizer_init=True)
    found = proposer(llm).policy
    for dear, drafts in ((0.0, 3), (1.0, 0), (0.0, 3)):  # rows for nothing, and rows at a second each
        found.cost = told(lambda rows, masked, dear=dear: 1.0 + dear * rows)
        for _ in range(2):  # the first lets the choice settle, and what the scheduler sees of it
            rows, _answers = _first_rows(llm, [PROMPT], max_tokens=24)
        assert len(rows[0][0]["drafts"]) == drafts
