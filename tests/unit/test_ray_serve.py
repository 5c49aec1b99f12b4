"""configs/ray/: Ray itself accepts every file, and zoo names are filled in."""

from __future__ import annotations

import pytest
import yaml

from tests.support.paths import ROOT
from vllm_idlm import ray_serve, zoo

CONFIGS = ROOT / "configs" / "ray"

SERVE = sorted(path.name for path in CONFIGS.glob("serve-*.yaml"))


def config(name):
    """A file's Serve config; KubeRay's manifest holds it as text."""
    documents = list(yaml.safe_load_all((CONFIGS / name).read_text()))
    if name.startswith("kuberay"):
        return yaml.safe_load(documents[0]["spec"]["serveConfigV2"])
    return documents[0]


def models(content):
    return [m for app in content["applications"] for m in app["args"]["llm_configs"]]


def test_the_zoo_fills_in_what_a_config_leaves_out(monkeypatch):
    monkeypatch.delenv("VLLM_IDLM_CONFIGS", raising=False)
    given = {
        "model_loading_config": {"model_id": "idlm-32b"},
        "engine_kwargs": {"max_model_len": 4096, "dtype": "float16"},
    }
    found = ray_serve.llm_config(given)
    assert found["model_loading_config"] == {"model_id": "idlm-32b", "model_source": "yifanyu/I-DLM-32B"}
    assert found["engine_kwargs"] == {
        "speculative_config": {"method": "isd", "n": 4, "mask_token_id": 151669},
        "dtype": "float16",
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "gpu_memory_utilization": 0.9,
        "max_model_len": 4096,
    }


def test_a_model_with_its_own_weights_stays_as_it_is():
    given = {
        "model_loading_config": {"model_id": "mine", "model_source": "org/mine"},
        "engine_kwargs": {"dtype": "auto"},
    }
    assert ray_serve.llm_config(given) == given


def test_an_unknown_name_is_refused():
    with pytest.raises(zoo.ZooError, match="did you mean idlm-32b"):
        ray_serve.llm_config({"model_loading_config": {"model_id": "idlm-32"}})


@pytest.mark.parametrize("name", [*SERVE, "kuberay-idlm-32b.yaml"])
def test_engine_arguments_are_vllms(name, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_idlm import embedded

    monkeypatch.setattr(embedded, "ensure", lambda: "made")
    for model in models(config(name)):
        found = ray_serve.llm_config(model)
        assert set(found["engine_kwargs"]) <= set(EngineArgs.__dataclass_fields__)
        assert found["engine_kwargs"]["speculative_config"]["method"] == "isd"


@pytest.mark.parametrize("name", [*SERVE, "kuberay-idlm-32b.yaml"])
def test_ray_accepts_the_config(name, monkeypatch):
    """By Ray's own schemas: the deployment, each model, its placement group and its autoscaling."""
    schema = pytest.importorskip("ray.serve.schema")
    llm = pytest.importorskip("ray.serve.llm")
    from ray.serve.config import AutoscalingConfig

    from vllm_idlm import embedded

    monkeypatch.setattr(embedded, "ensure", lambda: "made")
    content = config(name)
    schema.ServeDeploySchema.model_validate(content)
    for model in models(content):
        found = llm.LLMConfig(**ray_serve.llm_config(model))
        AutoscalingConfig(**model["deployment_config"]["autoscaling_config"])
        bundles = found.get_engine_config().placement_bundles
        assert len(bundles) == found.engine_kwargs.get("tensor_parallel_size", 1)


def test_kuberays_manifest_agrees_with_the_serve_config():
    service, policy = yaml.safe_load_all((CONFIGS / "kuberay-idlm-32b.yaml").read_text())
    assert (service["apiVersion"], service["kind"], policy["kind"]) == ("ray.io/v1", "RayService", "NetworkPolicy")
    cluster = service["spec"]["rayClusterConfig"]
    groups = cluster["workerGroupSpecs"]
    gpus = [g["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for g in groups]
    assert [int(gpu) for gpu in gpus] == [zoo.load("idlm-32b").engine["tensor_parallel_size"]]
    assert cluster["authOptions"] == {"mode": "token"}
    open_to = [rule["ports"] for rule in policy["spec"]["ingress"] if "role" in str(rule["from"])]
    assert open_to == [[{"port": 8000}]], "a gateway reaches the service and none of Ray's own ports"
    here = models(config("serve-idlm-32b.yaml"))[0]["deployment_config"]["autoscaling_config"]
    there = models(config("kuberay-idlm-32b.yaml"))[0]["deployment_config"]["autoscaling_config"]
    assert {key: here[key] for key in there} == there
    assert (groups[0]["minReplicas"], groups[0]["maxReplicas"]) == (there["min_replicas"], there["max_replicas"])
