"""Methods that ISD adds to vLLM's workers, by vLLM's own `worker_extension_cls`; call them by `collective_rpc`."""

from __future__ import annotations

from vllm_idlm.forced import Forced


class ISDWorkerExtension:
    """Mixed into vLLM's worker class. `llm.collective_rpc("isd_stats")` returns one dictionary a worker."""

    def isd_stats(self, reset: bool = False) -> dict | None:
        """The counts since the last reset (see `vllm_idlm.v1.stats.ISDStats`); None in one that does not sample."""
        isd = getattr(self.model_runner, "isd", None)
        if isd is None:
            return None
        result = isd.stats.as_dict()
        if reset:
            isd.reset_stats()
        return result

    def isd_synthetic(self, rate: float | None) -> None:
        """Benchmarks only, Model Runner V2 only: accept drafts at `rate`; the output means nothing. None: verify."""
        isd = getattr(self.model_runner, "isd", None)
        if isd is not None:
            if not hasattr(isd, "synthetic"):
                raise NotImplementedError("synthetic acceptance needs Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)")
            isd.synthetic = rate

    def isd_force(self, scripts: dict[str, list[int]] | None) -> None:
        """Draft what `scripts` say (`vllm_idlm.forced`), for `idlm doctor --engine`; None: what the masks propose."""
        isd = getattr(self.model_runner, "isd", None)
        if isd is not None:
            isd.forced = None if scripts is None else Forced(scripts)

    def isd_trace(self, on: bool = True) -> None:
        """Start (or stop) recording every forward of every request in the stats; for tests and debugging."""
        isd = getattr(self.model_runner, "isd", None)
        if isd is not None:
            isd.stats.trace = {} if on else None
