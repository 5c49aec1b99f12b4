"""`idlm serve`: vLLM's own server, with ISD switched on for the models of the zoo."""

from __future__ import annotations

import json
import sys

import typer

from vllm_idlm.cli.screen import err, fail

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
_OWN = "--plain"
_SPECULATION = ("--speculative-config", "--spec-method", "--spec-model", "--spec-tokens", "-sc", "--config")


def serve(context: typer.Context) -> None:
    """Serve MODEL by vLLM's own server, a model of the zoo with ISD: idlm serve MODEL, then flags of `vllm serve`.

    A name of the model zoo (see `idlm models`) is served with ISD at the zoo's stride, unless a flag says something
    else about speculation, or --plain says that there shall be none. Every other flag is vLLM's own and goes to it as
    it is (`vllm serve --help` lists them). For example: idlm serve smollm2-135m-risd --port 8000
    """
    try:
        arguments = vllm_arguments(context.args)
    except ValueError as error:
        fail(str(error), 2)
    _need_vllm()
    from vllm_idlm.cpu_build import ensure_vllm_metadata

    ensure_vllm_metadata()
    err.print("$ vllm " + " ".join(_quoted(a) for a in arguments), style="dim", markup=False)
    sys.argv = ["vllm", *arguments]
    from vllm.entrypoints.cli.main import main

    main()


def vllm_arguments(given: list[str]) -> list[str]:
    """Arguments of `vllm` for the arguments of `idlm serve`. Raises ValueError without a model, ZooError as the zoo."""
    from vllm_idlm import zoo

    flags = [a for a in given[1:] if a != _OWN]
    if not given or given[0].startswith("-"):
        raise ValueError(
            f"idlm serve takes the model first, given {' '.join(given) or 'nothing'!r}; for example: "
            "idlm serve smollm2-135m-risd --port 8000 (`idlm models` lists the zoo)"
        )
    entry = zoo.resolve(given[0])
    if entry is None or _OWN in given or any(_about_speculation(f) for f in flags):
        return ["serve", given[0], *flags]
    config = json.dumps({"method": "isd", "n": entry.n})
    return ["serve", given[0], "--speculative-config", config, *flags]


def _about_speculation(flag: str) -> bool:
    """Whether `flag` says something about speculation; a config file may, so it decides too."""
    name = flag.split("=")[0].replace("_", "-")
    return name in _SPECULATION or name.startswith(("--speculative-config.", "-sc."))


def _quoted(argument: str) -> str:
    import shlex

    return shlex.quote(argument)


def _need_vllm() -> None:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        fail("vLLM is not installed. Fix: `make setup` (CPU build), or pip install 'vllm-idlm[cuda]' on a GPU machine")
