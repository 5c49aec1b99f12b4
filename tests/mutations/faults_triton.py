"""Faults in the Triton kernels, in what only Model Runner V2 computes, and in their plain torch forms."""

from tests.mutations.fault import Fault

_VERIFY, _DRAFT, _GATE = "kernels/verify/triton.py", "kernels/draft/triton.py", "kernels/gate/triton.py"
_TAIL, _ROWS = "kernels/tail/triton.py", "kernels/verify/rows.py"
_TESTS = "tests/interpreted"
_VERIFIED = (
    f"{_TESTS}/test_verify.py::test_extreme_rows",
    f"{_TESTS}/test_verify.py::test_equals_the_oracle",
    f"{_TESTS}/test_verify.py",
)
_DRAFTED = (f"{_TESTS}/test_draft.py::test_drafts_equal_the_oracles", f"{_TESTS}/test_draft.py")
_GATED = (f"{_TESTS}/test_draft.py::test_the_gate_equals_the_oracle", f"{_TESTS}/test_speculator.py")
_SEES = "        sees = token[None, :] < visible[:, None]\n"

FAULTS = [
    Fault(
        "v2-accepts-by-the-inverse-ratio", "triton", _VERIFY,
        old="                going = tl.log(u) + log_q < log_p",
        new="                going = tl.log(u) + log_p < log_q",
        says="Drafts are accepted by q / p on Model Runner V2.",
        tests=_VERIFIED,
    ),
    Fault(
        "v2-q-without-its-temperature", "triton", _VERIFY,
        old='    x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32) / temperature',
        new='    x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)',
        says="Drafts are drawn at the request's temperature and verified with q at 1: sampled text is biased.",
        tests=_VERIFIED,
    ),
    Fault(
        "v2-tail-of-the-vocabulary-of-p", "triton", _VERIFY,
        old="""\
    else:
        raw = tl.load(logits + (first + place) * logits_stride + column, mask=mask, other=float("-inf"))
        x = raw.to(tl.float32) / scale
    return""",
        new="""\
    else:
        raw = tl.load(logits + (first + place) * logits_stride + column, mask=mask, other=0.0)
        x = raw.to(tl.float32) / scale
    return""",
        says="Behind the last token of a vocabulary that is no multiple of the block stand tokens of logit 0.",
        tests=_VERIFIED,
    ),
    Fault(
        "v2-maximum-not-carried", "triton", _VERIFY,
        old="    found = tl.sum(total * tl.exp(part - maximum), axis=0)",
        new="    found = tl.sum(total, axis=0)",
        says="Probabilities are wrong for vocabularies of more than one block.",
        tests=_VERIFIED,
    ),
    Fault(
        "v2-tie-to-the-last-block", "triton", "kernels/argmax.py",
        old="    value, first = tl.max(part, axis=0, return_indices=True)\n",
        new="    value = tl.max(part, axis=0)\n    first = tl.max(tl.where(part == value, block, 0), axis=0)\n",
        says="Greedy text differs from plain decoding's where two tokens of different blocks tie, common in bfloat16.",
        tests=(
            f"{_TESTS}/test_verify.py::test_equals_the_oracle[greedy-2-3-151936-dtype6]",
            f"{_TESTS}/test_verify.py",
            f"{_TESTS}/test_draft.py",
        ),
    ),
    Fault(
        "v2-tie-to-the-last-of-a-block", "triton", "kernels/argmax.py",
        old="    value, first = tl.max(score, axis=0, return_indices=True)\n",
        new="    value = tl.max(score, axis=0)\n"
        "    first = tl.max(tl.where(score == value, tl.arange(0, BLOCK), 0), axis=0)\n",
        says="Greedy text differs from plain decoding's where two tokens tie.",
        tests=_VERIFIED,
    ),
    Fault(
        "v2-emits-from-the-row-before", "triton", _VERIFY,
        old="    x = _load_anchor(rows, request, accepted, column, mask, temperature, HAS_PROCESSED)",
        new="    place = tl.maximum(accepted - 1, 0)\n"
        "    x = _load_anchor(rows, request, place, column, mask, temperature, HAS_PROCESSED)",
        says="The token after accepted drafts is drawn from the row before it.",
        tests=_VERIFIED,
    ),
    Fault(
        "v2-residual-is-p", "triton", _ROWS,
        old="        rest = (rest - q[batch, draft].exp().masked_fill(~rejected.unsqueeze(1), 0.0)).clamp(min=0)",
        new="        rest = rest.clamp(min=0)",
        says="The oracle of verification on V2, and what runs without Triton, draws rejected places from p.",
        tests=(f"{_TESTS}/test_verify.py::test_the_oracle_emits_p", *_VERIFIED),
    ),
    Fault(
        "accept-and-resample-share-their-noise", "triton", "kernels/noise/__init__.py",
        old="ACCEPT, RESAMPLE, DRAFT = 1, 2, 3",
        new="ACCEPT, RESAMPLE, DRAFT = 1, 1, 3",
        says="A rejection makes the first token of the vocabulary less likely: sampled text is biased.",
        tests=(f"{_TESTS}/test_verify.py::test_the_oracle_emits_p", *_VERIFIED, f"{_TESTS}/test_sampler.py"),
    ),
    Fault(
        "draft-and-accept-share-their-noise", "triton", "kernels/noise/__init__.py",
        old="ACCEPT, RESAMPLE, DRAFT = 1, 2, 3",
        new="ACCEPT, RESAMPLE, DRAFT = 1, 2, 1",
        says="Whether the first token of the vocabulary was drafted decides acceptance: sampled text is biased.",
        tests=(f"{_TESTS}/test_draft.py", f"{_TESTS}/test_verify.py", f"{_TESTS}/test_sampler.py"),
    ),
    Fault(
        "v2-draft-not-rounded-as-kept", "triton", _DRAFT,
        old='            score = tl.where(x == x, x, float("-inf")).to(proposal.dtype.element_ty).to(tl.float32)\n',
        new="",
        says="Drafts come from a finer q than the one that is kept to verify them: a slight bias.",
        tests=(f"{_TESTS}/test_draft.py::test_a_draft_is_drawn_from_what_is_kept", *_DRAFTED),
    ),
    Fault(
        "v2-q-kept-in-the-slot-of-the-batch", "triton", _DRAFT,
        old="            kept = proposal + slot * proposal_stride_slot",
        new="            kept = proposal + request * proposal_stride_slot",
        says="Drafts are verified with another request's q as soon as requests come and go.",
        tests=_DRAFTED,
    ),
    Fault(
        "v2-draft-temperature-ignored", "triton", _DRAFT,
        old="            score = score / temperature - noise",
        new="            score = score - noise",
        says="Drafts are drawn at temperature 1 and verified at the request's: sampled text is biased.",
        tests=_DRAFTED,
    ),
    Fault(
        "v2-gate-one-row-early", "triton", _GATE,
        old="        value = tl.where(row >= end - masks, draft_adapter, own)",
        new="        value = tl.where(row >= end - masks - 1, draft_adapter, own)",
        says="The draft adapter works on the last verified row too: another model's tokens in the text.",
        tests=_GATED,
    ),
    Fault(
        "v2-gate-one-row-late", "triton", _GATE,
        old="        value = tl.where(row >= end - masks, draft_adapter, own)",
        new="        value = tl.where(row > end - masks, draft_adapter, own)",
        says="The first mask drafts without its adapter, and its draft is mostly rejected.",
        tests=_GATED,
    ),
    Fault(
        "v2-users-adapter-on-mask-rows", "triton", _GATE,
        old="        value = tl.where(row >= end - masks, draft_adapter, own)",
        new="        value = tl.where((row >= end - masks) & (own < 0), draft_adapter, own)",
        says="Requests with an adapter of their own draft with that one: the same text, slower.",
        tests=_GATED,
    ),
    Fault(
        "v2-drafts-beyond-a-cut-row", "triton", _GATE,
        old="    count = tl.where(generated >= 0, tl.minimum(tl.load(drafts + slot), places), 0)",
        new="    count = tl.where(generated >= 0, tl.load(drafts + slot), 0)",
        says="Drafts that a token budget cut off are verified on rows of the next request.",
        tests=_GATED,
    ),
    Fault(
        "v2-tail-sees-the-rejected-draft", "triton", _TAIL,
        old=_SEES,
        new=_SEES.replace(" < ", " <= "),
        says="A mask of an extra group sees the draft whose rejection it is there for, and drafts badly.",
        tests=(f"{_TESTS}/test_tail.py",),
    ),
    Fault(
        "v2-tail-weight-not-carried", "triton", _TAIL,
        old="        weight = weight * kept + tl.sum(share, axis=1)",
        new="        weight = weight + tl.sum(share, axis=1)",
        says="Attention of extra groups is wrong beyond 64 keys.",
        tests=(f"{_TESTS}/test_tail.py",),
    ),
    Fault(
        "v2-tail-own-group-not-causal", "triton", _TAIL,
        old="(token[None, :] < own_end[:, None]))",
        new="(token[None, :] <= own_end[:, None]))",
        says="A mask of an extra group sees the one behind it, which no model was trained for.",
        tests=(f"{_TESTS}/test_tail.py",),
    ),
]  # fmt: skip
