"""Checks Kubernetes manifests as an API server does: unknown fields, wrong types, missing ones.

Kubernetes' own kinds are checked against its published schemas. JobSet is none of them: its fields
are listed here, from the reference of jobset.x-k8s.io/v1alpha2, and the Jobs inside it are checked
as Jobs.
"""

from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.34"
Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_ANYTHING: Schema = {}


def _one_of(*names: str) -> Schema:
    return {"enum": list(names)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _object(*required: str, **fields: Schema) -> Schema:
    return {
        "type": "object",
        "required": list(required),
        "properties": fields,
        "additionalProperties": False,
    }


_RULE = _object(
    "name",
    "action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=_one_of("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    # Those of a Job's condition of type Failed.
    onJobFailureReasons=_list(
        _one_of(
            "BackoffLimitExceeded",
            "DeadlineExceeded",
            "FailedIndexes",
            "MaxFailedIndexesExceeded",
            "PodFailurePolicy",
        )
    ),
    targetReplicatedJobs=_list(_STRING),
)
_REPLICATED_JOB = _object(
    "name",
    "template",
    name=_STRING,
    groupName=_STRING,
    replicas=_COUNT,
    template=_object("spec", metadata=_ANYTHING, spec=_ANYTHING),
    dependsOn=_list(_object("name", "status", name=_STRING, status=_one_of("Ready", "Complete"))),
)
_POLICY_OF_SUCCESS = _object(
    "operator", operator=_one_of("All", "Any"), targetReplicatedJobs=_list(_STRING)
)
_SPEC = _object(
    replicatedJobs=_list(_REPLICATED_JOB),
    network=_object(enableDNSHostnames=_FLAG, subdomain=_STRING, publishNotReadyAddresses=_FLAG),
    successPolicy=_POLICY_OF_SUCCESS,
    failurePolicy=_object(
        maxRestarts=_COUNT,
        restartStrategy=_one_of("Recreate", "BlockingRecreate"),
        rules=_list(_RULE),
    ),
    startupPolicy=_object("startupPolicyOrder", startupPolicyOrder=_one_of("AnyOrder", "InOrder")),
    suspend=_FLAG,
    coordinator=_object("replicatedJob", replicatedJob=_STRING, jobIndex=_COUNT, podIndex=_COUNT),
    managedBy=_STRING,
    ttlSecondsAfterFinished=_COUNT,
)
JOBSET = _object(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_ANYTHING,
    spec=_SPEC,
)


def check(manifest: dict[str, Any]) -> None:
    """Checks one object of a manifest.

    Raises:
      jsonschema.ValidationError: If it has an unknown field, a wrong type, or lacks a field.
    """
    if manifest["kind"] != "JobSet":
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, JOBSET)
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": manifest["metadata"],
            "spec": replicated["template"]["spec"],
        }
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
