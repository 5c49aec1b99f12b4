"""What ISD's adapters to both model runners hold: settings, counts, the runner and the draft adapter in its slots."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from vllm_idlm import __version__, patching
from vllm_idlm import settings as isd_settings
from vllm_idlm.engine_args import DRAFT_LORA_ID, VERSION, features
from vllm_idlm.forced import Forced
from vllm_idlm.tail import DevicePlan, TailAttention
from vllm_idlm.v1.stats import ISDStats

log = logging.getLogger("vllm.idlm")  # below vLLM's logger, so that it is printed as vLLM's lines are


def same_plugin(additional_config: dict[str, Any]) -> None:
    """SettingsError unless this process runs the plugin of the process that made the configuration, and has loaded it.

    Each rank asks at its start, whatever started it. Ranks with different code could draft differently.
    """
    theirs = additional_config.get(VERSION)
    if theirs != __version__:
        raise isd_settings.SettingsError(
            f"this worker ({socket.gethostname()}, process {os.getpid()}) has vllm-idlm {__version__}, the engine was "
            f"started by vllm-idlm {theirs}: every rank needs the same one. Install one version on all nodes"
        )
    if not patching.installed():
        raise isd_settings.SettingsError(
            f"this worker ({socket.gethostname()}, process {os.getpid()}) has vllm-idlm {__version__} but did not load "
            f"it: VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS')!r} there leaves idlm out. Unset it, or add idlm"
        )


class EngineState:
    """One engine's ISD. `runner` is set by `attach`, once vLLM has built it."""

    def __init__(self, vllm_config: Any) -> None:
        found = isd_settings.of(vllm_config)
        if found is None or found.mask_token_id is None:
            raise isd_settings.SettingsError(
                f"{type(self).__name__} needs additional_config['isd']; ask for it by speculative_config "
                '{"method": "isd", "n": 4} with the vllm-idlm plugin installed'
            )
        same_plugin(vllm_config.additional_config)
        patching.require(features(vllm_config))
        self.settings = found
        self.mask_token_id: int = found.mask_token_id
        self.stats = ISDStats()
        self.runner: Any = None
        self.draft_lora: Any = None
        self.tail: TailAttention | None = None  # with extra groups of masks only
        self.forced: Forced | None = None  # `idlm doctor --engine` only: what to draft, whatever the masks propose

    def load_model(self, model: Any) -> None:
        """Load the gated draft adapter (if any) into vLLM's LoRA slots, for good."""
        if self.settings.lora is None:
            return
        from vllm.lora.request import LoRARequest

        self.draft_lora = LoRARequest("isd-draft", DRAFT_LORA_ID, self.settings.lora)
        self.runner.add_lora(self.draft_lora)
        self.runner.pin_lora(DRAFT_LORA_ID)

    def hold_draft_lora(self) -> None:
        """Load the draft adapter again, for good, if vLLM threw it out since: it drops all adapters after warm-ups.

        Otherwise the first request waits for it, and it stays without the pin that keeps users' adapters from it.
        """
        if self.draft_lora is None:
            return
        if DRAFT_LORA_ID not in self.runner.list_loras():
            self.load_model(None)
        else:
            self.runner.pin_lora(DRAFT_LORA_ID)

    def hook_attention(self, plan: DevicePlan | None = None) -> None:
        """Set `tail`, for extra groups of masks; leave it None where they cannot run, under `auto`.

        Raises SettingsError if the engine's attention cannot have them and they were asked for by name.
        """
        tail = TailAttention(plan)
        try:
            tail.attach(self.runner)
        except isd_settings.SettingsError as error:
            if self.settings.coverage != "auto":
                raise
            log.info("%s", error)
        else:
            self.tail = tail

    def warm_kernels(self) -> None:
        """Before vLLM's warm-up: nothing to compile, but on Model Runner V2."""

    def warm_up(self) -> None:
        """The model is compiled; only a proposer with something to measure has anything to do."""

    def reset_stats(self) -> None:
        """Start counting anew; a trace that was on stays on."""
        self.stats = ISDStats(trace=None if self.stats.trace is None else {})
