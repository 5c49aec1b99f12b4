"""Whether every node of a Ray placement group has the plugin that starts the engine, asked before any worker starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_idlm import __version__
from vllm_idlm.settings import SettingsError

PROBE_SECONDS = 120  # a node's first Ray worker has to start, and to import this package

Found = tuple[str, str | None, str | None]  # host, version of the plugin, of vLLM; None: not installed


def check_nodes(placement_group: Any, runtime_env: Any = None) -> None:
    """SettingsError unless every node of the placement group has this version of the plugin, and of vLLM.

    One short Ray task a node looks, in the workers' own runtime environment.
    """
    import ray
    from ray.util import placement_group_table
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    nodes = sorted(set(placement_group_table(placement_group)["bundles_to_node_id"].values()))
    options = {"num_cpus": 0, "max_retries": 0, **({"runtime_env": dict(runtime_env)} if runtime_env else {})}
    look = ray.remote(_look())
    asked = [look.options(scheduling_strategy=OnNode(node, soft=False), **options).remote() for node in nodes]
    try:
        refuse_others(ray.get(asked, timeout=PROBE_SECONDS))
    except ray.exceptions.GetTimeoutError:
        raise SettingsError(
            f"a Ray node did not say within {PROBE_SECONDS} s which vllm-idlm it has (nodes {', '.join(nodes)}); see "
            "`ray status` for one that is down or full"
        ) from None


def _look() -> Callable[[], Found]:
    """The task. A function within a function is pickled by value: a node without the plugin could not import it."""

    def look() -> Found:
        import socket

        try:
            from vllm_idlm import __version__ as ours
            from vllm_idlm.patching import vllm_version
        except ImportError:
            return socket.gethostname(), None, None
        found = vllm_version()
        return socket.gethostname(), ours, None if found == "unknown" else found

    look.__annotations__ = {}  # `Found` is this module's
    return look


def refuse_others(found: list[Found]) -> None:
    """SettingsError for the first node that has other versions than this one."""
    from vllm_idlm.patching import vllm_version

    for host, ours, theirs in found:
        for name, there, here in (("vllm-idlm", ours, __version__), ("vllm", theirs, vllm_version())):
            if there != here:
                has = f"has {name} {there}" if there else f"has no {name}"
                raise SettingsError(
                    f"Ray node {host} {has}, the node that starts the engine has {name} {here}: all nodes need the "
                    f"same one. Install {name} {here} into the Python environment of Ray on {host}, then start Ray "
                    "there again"
                )
