"""Ray's nodes are asked before a worker starts: another plugin or vLLM is refused."""

from __future__ import annotations

import os
import re

import pytest

from vllm_idlm import __version__
from vllm_idlm.patching import vllm_version
from vllm_idlm.ray_nodes import check_nodes, refuse_others
from vllm_idlm.settings import SettingsError


def test_nodes_that_agree_pass():
    refuse_others([("a", __version__, vllm_version()), ("b", __version__, vllm_version())])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (("b", None, vllm_version()), f"node b has no vllm-idlm, .* has vllm-idlm {__version__}"),
        (("b", "9.9", vllm_version()), f"node b has vllm-idlm 9.9, .* has vllm-idlm {__version__}"),
        (("b", __version__, "0.1"), f"node b has vllm 0.1, .* has vllm {re.escape(vllm_version())}"),
    ],
)
def test_another_node_is_refused_with_both_versions(found, words):
    with pytest.raises(SettingsError, match=words):
        refuse_others([("a", __version__, vllm_version()), found])


@pytest.fixture
def two_nodes():
    """A Ray cluster of two nodes on this machine; a function starts the second with more on its PYTHONPATH."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})

    def start(path):
        place = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
        cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": place})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        from ray.util.placement_group import placement_group

        group = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")
        assert group.wait(60)
        return group

    yield start
    ray.shutdown()
    cluster.shutdown()


def _another_version(folder):
    (folder / "vllm_idlm-9.9.9.dist-info").mkdir()
    (folder / "vllm_idlm-9.9.9.dist-info" / "METADATA").write_text("Name: vllm-idlm\nVersion: 9.9.9\n")


_BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "vllm_idlm":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Block())
"""


def _no_plugin(folder):
    """Python runs sitecustomize at its start: there this package cannot be imported, from wherever."""
    (folder / "sitecustomize.py").write_text(_BLOCK)


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("change", "has"),
    [
        pytest.param(_another_version, "has vllm-idlm 9.9.9", marks=pytest.mark.slow),
        (_no_plugin, "has no vllm-idlm"),
    ],
)
def test_a_ray_node_with_another_installation_is_refused(two_nodes, tmp_path, change, has):
    """The second node's Python finds other files first, as a node that was set up differently would."""
    change(tmp_path)
    group = two_nodes(tmp_path)
    with pytest.raises(SettingsError, match=rf"{has}, the node that starts the engine has vllm-idlm {__version__}"):
        check_nodes(group)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_nodes_alike_pass(two_nodes, tmp_path):
    check_nodes(two_nodes(tmp_path))
