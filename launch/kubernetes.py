"""A Kubernetes JobSet, as YAML: one pod a node, torchrun in each, all pods started again together after a failure.

Every scalar is written as JSON, which YAML reads as it is: no value can change its type or end its line.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.launch.spec import Launch
from megagpt.launch.torchrun import elastic

SECRET = "megagpt-secrets"  # noqa: S105 - the name of the object, not what is in it
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9./_-]*")


def job_set(launch: Launch, *, layout: str) -> str:
    """The manifest. Raises UserError if the profile names no image or no volume, or the run is not on it."""
    name = kubernetes_name(launch.name)
    if not launch.cluster.image or not launch.cluster.claim:
        missing = "image" if not launch.cluster.image else "claim"
        raise UserError(
            f"the cluster profile has no {missing}, and pods need one.",
            'Add image = "REGISTRY/NAME:TAG" and claim = "VOLUME_CLAIM" to it.',
        )
    if not Path(launch.out).is_relative_to(launch.cluster.claim_path):
        raise UserError(
            f"the run's folder {launch.out} is not on the volume, which pods see at {launch.cluster.claim_path}.",
            "Launch from a machine that mounts the volume there too, with --out inside it.",
        )
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": launch.cluster.namespace, **_labels(launch)},
        "spec": {
            "failurePolicy": {"maxRestarts": launch.retries.inside},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": {"spec": _job(launch, name)}}],
        },
    }
    return f"# megagpt: {launch.name}, {launch.world_size()} ranks = {layout}.\n" + "\n".join(_yaml(manifest)) + "\n"


def kubernetes_name(name: str) -> str:
    """`name` as Kubernetes allows names: lower case, digits, dashes, at most 40 characters."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "megagpt"


def _labels(launch: Launch) -> dict[str, Any]:
    return {"labels": {"kueue.x-k8s.io/queue-name": launch.cluster.queue}} if launch.cluster.queue else {}


def _job(launch: Launch, name: str) -> dict[str, Any]:
    cluster = launch.cluster
    limits = {"nvidia.com/gpu": launch.gpus_per_node} if launch.devices else {}
    if cluster.cpus_per_task:
        limits["cpu"] = cluster.cpus_per_task * launch.gpus_per_node
    secrets = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": key, "optional": True}}}
        for key in cluster.secrets
    ]
    container = {
        "name": "ranks",
        "image": cluster.image,
        "workingDir": launch.folder,
        "command": elastic(launch, address=f"{name}-ranks-0-0.{name}", node="$(JOB_COMPLETION_INDEX)", restarts=0),
        "env": [*({"name": key, "value": value} for key, value in _escaped(launch).items()), *secrets],
        "resources": {"limits": limits},
        "volumeMounts": [
            {"name": "run", "mountPath": cluster.claim_path},
            {"name": "memory", "mountPath": "/dev/shm"},  # noqa: S108 - NCCL's, far above a container's 64 MiB
        ],
    }
    return {
        "parallelism": launch.nodes,
        "completions": launch.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": cluster.signal_seconds,
                "containers": [container],
                "volumes": [
                    {"name": "run", "persistentVolumeClaim": {"claimName": cluster.claim}},
                    {"name": "memory", "emptyDir": {"medium": "Memory"}},
                ],
            }
        },
    }


def _escaped(launch: Launch) -> dict[str, str]:
    """Kubernetes expands $(NAME) in values; $$ is a dollar sign."""
    return {name: value.replace("$", "$$") for name, value in launch.environment().items()}


def _yaml(value: Any, indent: str = "") -> list[str]:
    """Block style for what holds something, JSON for the rest."""
    lines = []
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for key, item in items:
        head = "-" if key is None else f"{key if _PLAIN.fullmatch(key) else json.dumps(key)}:"
        if not isinstance(item, dict | list) or not item:
            lines.append(f"{indent}{head} {json.dumps(item)}")
        elif key is None:
            first, *rest = _yaml(item, indent + "  ")
            lines += [f"{indent}- {first.lstrip()}", *rest]
        else:
            lines += [f"{indent}{head}", *_yaml(item, indent + "  ")]
    return lines
