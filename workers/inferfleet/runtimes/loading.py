"""What all runtimes share while they load: trust, threads, and one place where foreign errors become ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from inferfleet.errors import InferfleetError, ModelLoadError, UntrustedModelError
from inferfleet.ports import ModelVersion
from inferfleet.records import Signature

_MAX_REASON = 400


def label(version: ModelVersion) -> str:
    """Return how errors name the version."""
    return f"model {version.name} version {version.version}"


def refusal(version: ModelVersion, text: str) -> ModelLoadError:
    """Return the error that refuses this version because of ``text``."""
    return ModelLoadError(f"{label(version)}: {text}")


def require_trust(version: ModelVersion) -> None:
    """Raise UntrustedModelError, with the mend, unless code of this version may run."""
    if not version.trusted:
        raise UntrustedModelError(
            f'{label(version)} (runtime {version.runtime}) would run code; add "{version.name}" or '
            f'"{version.name}@sha256:{version.digest}" to [models] trusted'
        )


def declared_signature(version: ModelVersion) -> Signature:
    """Return what ``model.toml`` declares; raise ModelLoadError where it declares nothing."""
    if version.signature is None:
        raise refusal(version, "model.toml declares no [[input]] and [[output]]")
    return version.signature


def parameters(version: ModelVersion) -> dict[str, object]:
    """Return a copy of the ``[parameters]`` table."""
    given = version.options.get("parameters", {})
    if not isinstance(given, dict):
        raise refusal(version, "parameters in model.toml is not a table")
    return dict(given)


@contextlib.contextmanager
def translated(version: ModelVersion, doing: str) -> Iterator[None]:
    """Turn whatever foreign code raises into a one-line ModelLoadError; ours pass as they are."""
    try:
        yield
    except InferfleetError:
        raise
    except (Exception, SystemExit) as error:
        raise refusal(version, f"{doing} failed: {said(error)}") from error


def said(error: BaseException) -> str:
    """Return an error's type and text in one line of bounded length."""
    text = " ".join(str(error).split())
    whole = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return whole if len(whole) <= _MAX_REASON else whole[: _MAX_REASON - 1] + "…"


def granted_threads(threads: int) -> int:
    """Return ``threads``, or for 0 what the scheduler's affinity and the cgroup's quota grant; at least 1."""
    if threads > 0:
        return threads
    quota = _cgroup_cores()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores if quota is None else min(cores, int(quota)))


def _cgroup_cores() -> float | None:
    """Return the quota in cores, of cgroup v2 or v1 as seen from inside a container; ``None`` without one."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return None if quota_us <= 0 else quota_us / int((root / "cpu/cpu.cfs_period_us").read_text())
    return None
