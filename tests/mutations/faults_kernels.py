"""Faults in the kernels that run without Triton: plain torch, and C++ for the CPU."""

from tests.mutations.fault import Fault

_VERIFY, _DRAFT = "kernels/verify/naive.py", "kernels/draft/naive.py"
_BLOCK, _TAIL, _LORA = "kernels/verify/block.py", "kernels/tail/tail.cpp", "kernels/lora/rows.cpp"
_UNIT = "tests/unit/kernels"
_RULE = (
    f"{_UNIT}/verify/test_naive.py::test_acceptance_and_residual_are_exact",
    f"{_UNIT}/verify/test_naive.py::test_mixed_batch_equals_the_rule_by_hand",
    f"{_UNIT}/verify/test_naive.py",
)
_DRAWN = (f"{_UNIT}/draft/test_naive.py::test_drafts_follow_the_returned_q", f"{_UNIT}/draft/test_naive.py")
_BLOCKS = (f"{_UNIT}/verify/test_block.py",)
_PASSES = "    return uniform * proposal_at(proposal_logits, one_hot, drafts) < probability_at(logits, row, drafts)"
_BY_OPTIONS = """\
    if temperature is not None:
        logits.div_(temperature.masked_fill(greedy, 1.0).to(logits.dtype).unsqueeze(1))
    if top_k is not None:
        keep_top_k(logits, top_k)
    if top_p is not None:
        keep_top_p(logits, top_p)
    rows = rows_of_piece(logits)
    pieces = zip(logits.split(rows), uniform.split(rows), strict=True)
"""

FAULTS = [
    Fault(
        "verify-accepts-at-equality", "kernels", _VERIFY,
        old=_PASSES,
        new=_PASSES.replace(" < ", " <= "),
        says="A token that the options exclude (p = 0) comes out now and then.",
        tests=(f"{_UNIT}/verify/test_naive.py::test_a_draft_that_p_excludes_is_never_accepted", *_RULE),
    ),
    Fault(
        "verify-ratio-inverted", "kernels", _VERIFY,
        old=_PASSES,
        new="    return uniform * probability_at(logits, row, drafts) < proposal_at(proposal_logits, one_hot, drafts)",
        says="Drafts are accepted by q / p: sampled text follows the draft adapter.",
        tests=_RULE,
    ),
    Fault(
        "verify-without-q", "kernels", _VERIFY,
        old=_PASSES,
        new="    return uniform < probability_at(logits, row, drafts)",
        says="Likely drafts are rejected too often, and the residual then favours what q did not.",
        tests=_RULE,
    ),
    Fault(
        "residual-is-p", "kernels", _VERIFY,
        old="        rest.sub_(q.masked_fill_(~soft.unsqueeze(1), 0.0)).clamp_(min=0)  # filled",
        new="        rest.clamp_(min=0)  # filled",
        says="After a rejection the token is drawn from p: what q favours comes out too often.",
        tests=_RULE,
    ),
    Fault(
        "residual-not-clamped", "kernels", _VERIFY,
        old=".masked_fill_(~soft.unsqueeze(1), 0.0)).clamp_(min=0)  # filled",
        new=".masked_fill_(~soft.unsqueeze(1), 0.0))  # filled",
        says="Negative weights in the residual shift the token drawn after a rejection.",
        tests=_RULE,
    ),
    Fault(
        "residual-keeps-the-rejected-draft", "kernels", _VERIFY,
        old="    rest.scatter_(1, token, rest.gather(1, token).masked_fill_(rejected.unsqueeze(1), 0.0))\n",
        new="",
        says="An argmax draft that was rejected is drawn again, so it comes out too often.",
        tests=_RULE,
    ),
    Fault(
        "residual-empty-without-fallback", "kernels", _VERIFY,
        old="    return draw(torch.where(empty, p, rest), resample)",
        new="    return draw(rest, resample)",
        says="Where p and q are equal up to rounding, the last token of the vocabulary comes out.",
        tests=(f"{_UNIT}/verify/test_naive.py::test_an_empty_residual_falls_back_to_p", *_RULE),
    ),
    Fault(
        "bonus-token-from-the-row-before", "kernels", _VERIFY,
        old="    last = where.first_row + accepted\n",
        new="    last = where.first_row + (accepted - 1).clamp(min=0)\n",
        says="The token after accepted drafts is drawn from the row before it.",
        tests=_RULE,
    ),
    Fault(
        "drafts-accepted-behind-a-rejection", "kernels", _VERIFY,
        old="        return grid.cumprod(1).sum(1)",
        new="        return grid.sum(1)",
        says="Drafts behind a rejected one are kept, although they follow a token that was not emitted.",
        tests=_RULE,
    ),
    Fault(
        "greedy-tie-to-the-last", "kernels", _VERIFY,
        old="    best = logits.argmax(-1)\n",
        new="    best = logits.shape[1] - 1 - logits.flip(1).argmax(-1)\n",
        says="Greedy text differs from plain decoding's wherever two tokens tie.",
        tests=(f"{_UNIT}/verify/test_naive.py::test_greedy_needs_no_noise_and_a_tie_goes_to_the_lowest_index", *_RULE),
    ),
    Fault(
        "block-ratio-not-carried", "kernels", _BLOCK,
        old="        ratio = torch.where(live, (ratio * grid[0, :, place]).clamp(max=1), ratio)",
        new="        ratio = torch.where(live, grid[0, :, place].clamp(max=1), ratio)",
        says="Block verification judges each draft by its own ratio, and the text is biased.",
        tests=_BLOCKS,
    ),
    Fault(
        "block-ratio-not-capped", "kernels", _BLOCK,
        old="(ratio * grid[0, :, place]).clamp(max=1), ratio)",
        new="(ratio * grid[0, :, place]), ratio)",
        says="Block verification lets one good draft pay for later bad ones, and the text is biased.",
        tests=_BLOCKS,
    ),
    Fault(
        "block-residual-without-the-ratio", "kernels", _BLOCK,
        old="        left, token = p * ratio.float().unsqueeze(1), self.drafts[draft].unsqueeze(1)",
        new="        left, token = p.clone(), self.drafts[draft].unsqueeze(1)",
        says="Block verification emits from max(p - q, 0), not from max(r p - q, 0).",
        tests=_BLOCKS,
    ),
    Fault(
        "draft-drawn-before-the-temperature", "kernels", _DRAFT,
        old=_BY_OPTIONS,
        new="    drawn_from = logits.clone()\n" + _BY_OPTIONS.replace("zip(logits.split", "zip(drawn_from.split"),
        says="Drafts come from q at temperature 1 and are verified with q at the request's: sampled text is biased.",
        tests=_DRAWN,
    ),
    Fault(
        "draft-drawn-before-top-k", "kernels", _DRAFT,
        old=_BY_OPTIONS,
        new=_BY_OPTIONS.replace("    if top_k", "    drawn_from = logits.clone()\n    if top_k").replace(
            "zip(logits.split", "zip(drawn_from.split"
        ),
        says="Drafts come from the whole q and are verified with the truncated one: sampled text is biased.",
        tests=_DRAWN,
    ),
    Fault(
        "draft-may-be-the-mask-token", "kernels", _DRAFT,
        old='    logits[:, mask_token_id] = float("-inf")\n',
        new="",
        says="The mask token is drafted, a draft that is hardly ever right.",
        tests=_DRAWN,
    ),
    Fault(
        "draft-tie-to-the-last", "kernels", _DRAFT,
        old="        return Proposal(logits.argmax(-1), None)",
        new="        return Proposal(logits.shape[1] - 1 - logits.flip(1).argmax(-1), None)",
        says="At a tie the draft is not the token that verification takes: one more rejection.",
        tests=_DRAWN,
    ),
    Fault(
        "tail-sees-the-rejected-draft", "kernels", _TAIL,
        old="      if (place < rows.visible[i] ||",
        new="      if (place <= rows.visible[i] ||",
        says="A mask of an extra group sees the draft whose rejection it is there for, and drafts badly.",
        tests=(f"{_UNIT}/test_tail.py", "tests/engine/test_proposer.py"),
    ),
    Fault(
        "tail-sees-the-next-mask", "kernels", _TAIL,
        old="place < rows.own_end[i])) continue;",
        new="place <= rows.own_end[i])) continue;",
        says="A mask of an extra group sees the one behind it, which no model was trained for.",
        tests=(f"{_UNIT}/test_tail.py",),
    ),
    Fault(
        "tail-sum-not-carried", "kernels", _TAIL,
        old="      state.sum[m] *= scale;\n",
        new="",
        says="Attention of extra groups is wrong beyond 32 keys.",
        tests=(f"{_UNIT}/test_tail.py",),
    ),
    Fault(
        "lora-of-the-first-slot", "kernels", _LORA,
        old="  const T* b = slice.b + block.slot * slice.rank * slice.out + first;",
        new="  const T* b = slice.b + first;",
        says="With several adapters loaded, half of each is that of the first slot.",
        tests=(f"{_UNIT}/test_lora.py::test_equals_the_oracle", "tests/engine/test_punica.py"),
    ),
    Fault(
        "lora-on-rows-without-an-adapter", "kernels", _LORA,
        old="    const int64_t slot = slots[row];\n    if (slot < 0) continue;",
        new="    const int64_t slot = slots[row] < 0 ? 0 : slots[row];",
        says="The draft adapter works on verified rows: the text is no longer the base model's.",
        tests=(f"{_UNIT}/test_lora.py::test_equals_the_oracle", "tests/engine/test_punica.py"),
    ),
]  # fmt: skip
