"""The launchers' manifests: against schemas, and as JAX and Kubernetes read them."""

import copy
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.experiments import jobset

LAUNCH = Path(__file__).resolve().parents[2] / "experiments" / "launch"
RUN = {
    "NAME": "first",
    "IMAGE": "image",
    "CLAIM": "runs",
    "MODULE": "a.script",
    "FLAGS": "--ranks 4",
}
SIZES: dict[str, dict[str, Any]] = {
    "gke_tpu.yaml": {
        "ACCELERATOR": "tpu-v5-lite-podslice",
        "TOPOLOGY": "4x4",
        "SLICES": 2,
        "HOSTS": 4,
        "CHIPS": 4,
    },
    "gke_gpu.yaml": {"ACCELERATOR": "nvidia-h100-80gb", "NODES": 2, "GPUS": 8},
}
# Their keys are the user's.
FREE = {"annotations", "nodeSelector", "limits"}


def manifests(name: str) -> list[dict[str, Any]]:
    """Fills in the variables, as envsubst does, and reads the objects."""
    text = (LAUNCH / name).read_text(encoding="utf-8")
    return list(yaml.safe_load_all(string.Template(text).substitute({**RUN, **SIZES[name]})))


def misspelt(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Gives copies of a tree with one key of a dictionary misspelt, and the path of that key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        here = f"{path}.{key}"
        if isinstance(tree, dict):
            yield here, {f"{k}s" if k == key else k: v for k, v in tree.items()}
        if isinstance(value, dict | list) and key not in FREE:
            for below, changed in misspelt(value, here):
                other = copy.copy(tree)
                other[key] = changed
                yield below, other


def fits(manifest: dict[str, Any]) -> bool:
    try:
        jobset.check(manifest)
    except jsonschema.ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", list(SIZES))
def test_the_manifests_fit_their_schemas(name: str) -> None:
    for manifest in manifests(name):
        jobset.check(manifest)


def test_every_misspelt_field_is_found() -> None:
    for manifest in manifests("gke_gpu.yaml"):
        # Without these no schema is known.
        for path, changed in misspelt(manifest):
            if path in (".apiVersion", ".kind"):
                continue
            assert not fits(changed), f"{manifest['kind']}{path} may be misspelt"


@pytest.mark.parametrize(
    ("variable", "value"), [("NODES", "two"), ("NODES", 0.5), ("NAME", 7), ("IMAGE", 7)]
)
def test_a_value_of_a_wrong_type_is_found(
    variable: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES["gke_gpu.yaml"], variable, value)
    with pytest.raises(jsonschema.ValidationError):
        jobset.check(manifests("gke_gpu.yaml")[-1])


@pytest.mark.parametrize("name", list(SIZES))
def test_the_readme_lists_the_variables_of_a_manifest(name: str) -> None:
    text = (LAUNCH / name).read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{(\w+)\}", text))
    assert used == {*RUN, *SIZES[name]}
    readme = (LAUNCH / "README.md").read_text(encoding="utf-8").splitlines()
    [row] = [line for line in readme if line.startswith(f"| [{name}]")]
    assert set(re.findall(r"`(\w+)`", row)) | set(RUN) == used
    [common] = [line for line in readme if line.startswith("| both |")]
    assert set(re.findall(r"`(\w+)`", common)) == set(RUN)


@pytest.mark.parametrize("name", list(SIZES))
def test_a_pod_that_saved_after_sigterm_fails_its_job_and_restarts_all(name: str) -> None:
    spec = manifests(name)[-1]["spec"]
    [replicated] = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    shell, flag, command = container["command"]
    # Without exec the shell would get the signal.
    assert (shell, flag, command.split()[0]) == ("sh", "-c", "exec")
    assert command.split()[1:4] == ["python", "-m", "a.script"]
    assert "--stopped-code 75" in command
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    [rule] = job["podFailurePolicy"]["rules"]
    # Refused flags, and not a run that was stopped early, end the JobSet.
    assert rule["onExitCodes"] == {"operator": "In", "values": [2]}
    assert spec["failurePolicy"]["maxRestarts"] > 0
    # The run's folder is on the volume that outlives the pod.
    [claim] = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    output = command.split("--output ")[1]
    assert output.startswith(f"{mounts[claim['name']]}/")


def test_gpu_pods_have_what_jax_asks_the_api_for() -> None:
    account, role, binding, jobs = manifests("gke_gpu.yaml")
    [replicated] = jobs["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    # JAX counts the pods of one Job, by its parallelism, and needs an index of each.
    assert replicated["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == SIZES["gke_gpu.yaml"]["NODES"]
    # Its list_namespaced_pod and read_namespaced_job.
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]},
    ]
    name = account["metadata"]["name"]
    assert job["template"]["spec"]["serviceAccountName"] == name
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_tpu_pods_are_one_job_a_slice_and_one_pod_a_host() -> None:
    [jobs] = manifests("gke_tpu.yaml")
    sizes = SIZES["gke_tpu.yaml"]
    [replicated] = jobs["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == sizes["SLICES"]
    assert job["parallelism"] == job["completions"] == sizes["HOSTS"]
    topology = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert jobs["metadata"]["annotations"] == {topology: "cloud.google.com/gke-nodepool"}
    [container] = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": sizes["CHIPS"]}
