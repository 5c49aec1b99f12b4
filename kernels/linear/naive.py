"""Products of rows with a weight in plain torch: the oracle of the compiled form, meant to be obviously right."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[.., o] = sum_i x[.., i] weight[o, i] + bias[o], summed in float64 and rounded once, to the dtype of x.

    x: [.., in]; weight: [out, in]; bias: [out], all of one dtype.
    """
    found = torch.einsum("...i,oi->...o", x.double(), weight.double())
    return (found if bias is None else found + bias.double()).to(x.dtype)
