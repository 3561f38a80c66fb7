"""Cluster profiles: ~/.config/megagpt/clusters/NAME.toml, or a TOML file's path; `spec.Cluster` lists the settings."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megagpt.config import tomllib
from megagpt.errors import UserError, did_you_mean
from megagpt.launch.spec import Cluster
from megagpt.settings import build


def folder() -> Path:
    """Where a user's profiles lie."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "megagpt" / "clusters"


def load_cluster(name: str) -> Cluster:
    """The cluster of a profile's name or path; no name is the profile 'default', if there is one.

    Raises UserError for a profile that is missing or holds a wrong setting.
    """
    path = Path(name) if name.endswith(".toml") else folder() / f"{name or 'default'}.toml"
    if not path.is_file():
        if not name:
            return Cluster()
        hint = did_you_mean(name, (known.stem for known in folder().glob("*.toml")))
        raise UserError(f"no cluster profile '{name}' ({path}).{hint}", "docs/launch.md shows how to write one.")
    try:
        cluster = build(Cluster, tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    _check(cluster, path)
    return cluster


def _check(cluster: Cluster, path: Path) -> None:
    """Refuse what would break a line of the script, or write a secret into it."""
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"{path}: environment.{name} is not a variable's name.")
        if name in cluster.secrets or re.search(r"(_|^)(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)(_|$)", name):
            raise UserError(
                f"{path}: environment.{name} looks like a secret, and everything in environment is written down.",
                f'Put "{name}" into secrets, and export its value in the shell that submits.',
            )
    for name in ("partition", "account", "qos", "reservation", "constraint", "time", "gpu_type"):
        if re.search(r"[\s\"'\\]", getattr(cluster, name)):
            raise UserError(f"{path}: {name} = {getattr(cluster, name)!r} holds a space, a quote or a backslash.")
    if cluster.spares < 0 or cluster.signal_seconds < 1:
        raise UserError(f"{path}: spares must be at least 0, and signal_seconds at least 1.")
    if cluster.container != "none" and not cluster.image:
        raise UserError(f"{path}: container = {cluster.container} has no image.", 'Add image = "FILE or ADDRESS".')
    for mount in cluster.mounts:
        if "," in mount:
            raise UserError(f"{path}: the mount {mount} holds a comma, at which container tools cut lists.")
