"""How many drafts and which groups of mask slots a forward is to carry, so that tokens a second are most.

With k = n - 1 drafts, a_i the acceptance of draft i given those before it, r_j = a_1 .. a_j:

    P_j = r_j (1 - a_(j+1)),  P_k = r_k      exactly j drafts are accepted
    E   = 1 + r_1 + .. + r_k                 tokens of a verify forward

If the masks behind the accepted prefix were there, the next forward verifies again; if not (probability u, the sum of
P_j over the groups left out), it is cold: one token, and drafts. A cycle is 1 verify and u cold forwards, so

    rate = (E + u) / (T(rows) + u T(cold rows))          rows = 1 + k + m (1 + groups),  cold rows = 1 + m,  m = k

tokens a second. All groups cost the same rows, so the best g groups are the g likeliest: n^2 / 2 rates are looked at.
A cold forward yields 1 token where the rate would have had rate T(cold): it loses V = rate T(cold) - 1, and a group
takes rate dT tokens' worth of time. So a request that knows its own P_j (`outcomes` of its drafts' own acceptances)
carries group j if P_j V > rate dT (`worthwhile`). None of this touches what is verified: masks only propose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol


class Choice(NamedTuple):
    """What a forward is to carry."""

    stride: int  # 1: plain decoding
    groups: tuple[int, ...]  # extra groups by the number of drafts accepted, the likeliest first
    rate: float  # tokens a second that this is expected to yield, of all requests
    value: float  # V: tokens that a request loses by a cold forward
    price: float  # of one group's rows, in tokens


def outcomes(acceptance: Sequence[float]) -> list[float]:
    """P_0 .. P_k: the probability that exactly j drafts are accepted. acceptance: a_1 .. a_k."""
    reached, found = 1.0, []
    for rate in acceptance:
        found.append(reached * (1 - rate))
        reached *= rate
    return [*found, reached]


def expected_tokens(acceptance: Sequence[float]) -> float:
    """E: tokens of a verify forward."""
    return sum((j + 1) * p for j, p in enumerate(outcomes(acceptance)))


def plainly(cost: Callable[[int, bool], float], requests: int) -> Choice:
    """Plain decoding. Arguments as of `choose`."""
    return Choice(1, (), requests / cost(requests, False), 0.0, 0.0)


_NOTHING = Choice(1, (), 0.0, 0.0, 0.0)


def choose(
    acceptance: Sequence[float],
    cost: Callable[[int, bool], float],
    requests: int = 1,
    most: int = 99,
    plain: bool = True,
) -> Choice:
    """The stride (at most len(acceptance) + 1) and the groups with the highest rate.

    acceptance: a_1 .. a_k; cost: seconds of a forward with that many rows in the batch, with mask slots or without;
    requests: of the batch, each with such a row; most: extra groups that may be carried; plain: whether plain decoding
    is among the choices (else the rate is 0 where nothing is left).
    """
    best = plainly(cost, requests) if plain else _NOTHING
    for k in range(1, len(acceptance) + 1):
        chances = outcomes(acceptance[:k])
        likeliest = sorted(range(k), key=lambda j: -chances[j])
        tokens, cold = expected_tokens(acceptance[:k]), cost(requests * (1 + k), True)
        for count in range(min(k, most) + 1):
            missed = 1 - chances[k] - sum(chances[j] for j in likeliest[:count])
            rows = requests * (1 + 2 * k + count * k)
            taken = cost(rows, True)
            rate = requests * (tokens + missed) / (taken + missed * cold)
            if rate > best.rate:
                own = rate / requests  # of one request
                step = cost(rows + requests * k, True) - taken
                best = Choice(k + 1, tuple(likeliest[:count]), rate, own * cold - 1, own * step)
    return best


def width(stride: int, groups: int = 0) -> int:
    """Slots of a row of Model Runner V2: room for the drafts and the masks behind them, and that many extra groups."""
    return (stride - 1) * (2 + groups)


def choose_width(
    acceptance: Sequence[float],
    cost: Callable[[int, bool], float],
    requests: int = 1,
    most: int = 99,
    widths: Collection[int] = (),
    plain: bool = True,
) -> Choice:
    """`choose` where all rows of a forward are of one width, cold ones too, and groups stand behind full rows alone.

    So is Model Runner V2: a cycle of 1 + u forwards takes (1 + u) T(rows), and the groups are those behind the fewest
    accepted drafts. Same arguments; `value` and `price` are not used there, and 0. widths: the only ones there are (in
    slots, besides 0), unless empty.
    """
    best = plainly(cost, requests) if plain else _NOTHING
    whole = len(acceptance)
    for k in range(1, whole + 1):
        chances, tokens = outcomes(acceptance[:k]), expected_tokens(acceptance[:k])
        for count in range((min(k, most) if k == whole else 0) + 1):
            slots = width(k + 1, count)
            if widths and slots not in widths:
                continue
            missed = 1 - chances[k] - sum(chances[:count])
            taken = cost(requests * (1 + slots), True)
            rate = requests * (tokens + missed) / ((1 + missed) * taken)
            if rate > best.rate:
                best = Choice(k + 1, tuple(range(count)), rate, 0.0, 0.0)
    return best


class Known(Protocol):
    """A cost that says how much it knows: `estimates.Cost`."""

    def __call__(self, rows: int, masked: bool) -> float: ...

    def known(self, masked: bool) -> float: ...


def settle(rule: Callable[..., Choice], acceptance: Sequence[float], cost: Known, requests: int, *rest: Any) -> Choice:
    """What `rule` (`choose`, `choose_width`) says; or the best of the other kind, if what that takes is not known.

    Drafting and plain decoding are the two kinds. One that is not run is judged by a table taken when the engine
    started, and would never be found out if that has it too dear. So it is tried where less than a step of it is
    remembered, unless it is expected to be slower than half the best. That is forgotten again, so it is at the start
    and every thousand steps or so.
    """
    best = rule(acceptance, cost, requests, *rest)
    drafts = best.stride > 1
    if cost.known(not drafts) >= 1:
        return best
    other = plainly(cost, requests) if drafts else rule(acceptance, cost, requests, *rest, plain=False)
    return other if other.rate > best.rate / 2 else best


def worthwhile(acceptance: Sequence[float], choice: Choice) -> tuple[int, ...]:
    """The groups that pay for a row whose drafts have these acceptances, the likeliest first."""
    chances = outcomes(acceptance)[:-1]
    return tuple(
        j for j in sorted(range(len(chances)), key=lambda j: -chances[j]) if chances[j] * choice.value > choice.price
    )
