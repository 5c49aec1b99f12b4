"""Which forms of our Triton kernels are launched: what Triton's compiler would tell apart, seen by its interpreter."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction

Forms = dict[str, set[tuple]]  # by "module.kernel": (name, form) of each argument that tells forms apart


@contextlib.contextmanager
def recorded() -> Iterator[Forms]:
    """The forms of all launches inside, of kernels of this package."""
    found: Forms = defaultdict(set)
    run = InterpretedFunction.run

    def noted(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if ".kernels." in self.fn.__module__:
            names = self.fn.__module__.split(".")
            found[f"{names[-2]}.{self.fn.__name__}"].add(form(self, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = noted
    try:
        yield found
    finally:
        InterpretedFunction.run = run


def form(kernel: InterpretedFunction, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """What a compiled kernel is cached by: types, 16-byte alignment of pointers, integers that are 1 or multiples of
    16, and constants. (Of `triton.runtime.jit`, whose cache key is made of the same.)"""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    free = kernel.kwargs.get("do_not_specialize") or ()
    constants = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
    return tuple(
        (name, value if name in constants or name not in kernel.arg_names else _special(value, name not in free))
        for name, value in given.items()
    )


def _special(value: Any, specialize: bool) -> tuple:
    return native_specialize_impl(BaseBackend, value, False, specialize, True)


def flags(found: set[tuple]) -> list[tuple]:
    """The constants that are flags of a kernel, one entry a form."""
    return [tuple((name, value) for name, value in form if isinstance(value, bool)) for form in found]
