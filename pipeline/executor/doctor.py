"""Looks at everything that a build needs before it starts, and tells all problems at once with their mends.

Nothing is loaded and nothing is built: packages by their metadata, checkpoints by their headers, sources by
their lists. With a cluster's address a stage is looked at where it will run: on a node with a GPU if it asks
for one, in its own `runtime_env`.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ...schemas.config import Backend, BuildConfig
from ...schemas.errors import ConfigError, IntegrityError, ParaCaptionError
from ..corpus import work_list as plans
from . import driver, gpus, ray_data
from .estimate.pools import find_pools
from .findings import (
    FAIL,
    OK,
    WARN,
    Finding,
    packages,
)
from .gpus import Gpu
from .preflight import backend_packages, check, one_line, protocols, read_sources

if TYPE_CHECKING:
    pass

_TIGHT = 0.1
"""Of its budget a stage should have this much beside its weights: activations, caches."""
_LOOK_S = 300.0


class Node(msgspec.Struct, frozen=True):
    """A machine of the cluster, or this one (`id` is then empty)."""

    id: str
    host: str
    gpus: list[Gpu]


def examine(config: BuildConfig, ray_address: str | None = None) -> list[Finding]:
    """Every check, in the order in which a build would trip over them. Never raises for what it looks at.

    Args:
        config: of the build.
        ray_address: "auto" or host:port of the cluster; None: this machine alone.
    """
    findings = [*packages()]
    nodes = [Node("", socket.gethostname(), gpus.seen())]
    if ray_address is not None:
        try:
            ray_data.RayEngine(ray_address).start(config)
            nodes = _nodes()
            hosts = ", ".join(f"{node.host} ({len(node.gpus)} GPUs)" for node in nodes)
            findings.append(Finding("cluster", OK, f"{len(nodes)} nodes: {hosts}"))
        except Exception as error:  # noqa: BLE001 - whatever Ray says, the other checks go on
            told = one_line(error)
            mend = "see docs/cluster.md; the other checks are of this machine"
            findings.append(Finding("cluster", FAIL, f"{ray_address}: {told}", mend))
            ray_address = None
    findings += resources(config, nodes, ray_address is not None)
    for protocol in protocols(config):
        findings += _stage(protocol, getattr(config, protocol), nodes, ray_address is not None)
    findings += read_sources(config)
    findings += output(config, nodes if ray_address is not None else [])
    return findings


# The machine's or the cluster's GPUs and CPUs.


def resources(config: BuildConfig, nodes: list[Node], on_cluster: bool) -> Iterator[Finding]:
    """Whether the smallest pools of every subset fit at once."""
    for subset in config.subsets:
        pools = find_pools(config, subset)
        for name, there in (
            ("GPU", _there("GPU", nodes, on_cluster)),
            ("CPU", _there("CPU", nodes, on_cluster)),
        ):
            needed = sum(pool.min_actors * getattr(pool, f"num_{name.lower()}s") for pool in pools)
            if not needed:
                continue
            said = f"the smallest pools hold {needed:g} {name}s at once, there are {there:g}"
            if needed <= there + 1e-6:
                yield Finding(f"{subset} {name}s", OK, said)
            elif name == "CPU" and not on_cluster:
                yield Finding(f"{subset} CPUs", OK, f"{said}; on one machine they share")
            else:
                mend = "lower `concurrency` or the resources per actor, or add nodes"
                if name == "GPU" and not on_cluster:
                    mend += "; for a cluster run this with --ray-address"
                yield Finding(f"{subset} {name}s", FAIL, said, mend)


def _there(name: str, nodes: list[Node], on_cluster: bool) -> float:
    if on_cluster:
        import ray

        return float(ray.cluster_resources().get(name, 0))
    return float(len(nodes[0].gpus) if name == "GPU" else len(os.sched_getaffinity(0)))


# A stage's model.


def _stage(protocol: str, backend: Backend, nodes: list[Node], on_cluster: bool) -> list[Finding]:
    """Look at one backend where its actors will run."""
    seen = [gpu for node in nodes for gpu in node.gpus]
    title = f"{protocol} {backend.name}"
    if not on_cluster:
        if backend.runtime_env:
            mend = "run this with --ray-address: the stage's runtime_env is made by Ray"
            return [Finding(title, WARN, "not looked at: it has an environment of its own", mend)]
        return look(protocol, backend, seen)
    node = next((node for node in nodes if node.gpus), nodes[0]) if backend.num_gpus else nodes[0]
    try:
        return _remotely(look, node, backend.runtime_env)(protocol, backend, seen)
    except Exception as error:  # noqa: BLE001 - an environment that cannot be made is a finding
        mend = (
            "mend the stage's `runtime_env`: it needs this project, and Ray in this version"
            if backend.runtime_env
            else "the node needs the same Python environment as this one"
        )
        return [Finding(title, FAIL, f"on {node.host}: {one_line(error)}", mend)]


def look(protocol: str, backend: Backend, seen: list[Gpu]) -> list[Finding]:
    """Packages, checkpoint and memory of one backend, in this process.

    Args:
        protocol: "captioner", "judge" or "segmenter".
        backend: from the configuration.
        seen: the GPUs that its actors will run on.
    """
    title = f"{protocol} {backend.name}"
    found = list(backend_packages(protocol, backend))
    try:
        checked = check(protocol, backend)
    except Exception as error:  # noqa: BLE001 - a backend of the user's may raise anything
        told = str(error) if isinstance(error, ParaCaptionError) else one_line(error)
        said, _, mend = told.partition("; ")
        return [*found, Finding(title, FAIL, said, mend or f"mend {protocol} in the configuration")]
    if checked is None:
        return [*found, Finding(title, OK, "its options fit; nothing else to check without loading it")]
    found.append(Finding(title, OK, checked.what))
    found += [Finding(title, OK, note) for note in checked.notes]
    if checked.weight_bytes:
        found.append(memory(protocol, backend, checked.weight_bytes, seen))
    return found


def memory(protocol: str, backend: Backend, weight_bytes: int, seen: list[Gpu]) -> Finding:
    """Whether an actor's weights fit into its share of the smallest GPU, with room to work.

    vLLM takes `options.engine.gpu_memory_utilization` of a whole GPU, whatever share of it the actor holds.
    """
    title = f"{protocol} memory"
    weights = f"{weight_bytes / 1e9:.1f} GB of weights"
    if not backend.num_gpus:
        import psutil

        there = psutil.virtual_memory().total
        needed = weight_bytes * backend.concurrency[0]
        said = f"{weights} x {backend.concurrency[0]} actors in {there / 1e9:.0f} GB of main memory"
        if needed > there:
            return Finding(title, FAIL, said, f"lower {protocol}.concurrency, or give it a GPU")
        return Finding(title, WARN if needed > 0.7 * there else OK, said)
    if not seen:
        mend = "run this on a GPU node, or with --ray-address"
        return Finding(title, WARN, f"{weights}; no GPU is seen here to compare with", mend)
    gpu = min(seen, key=lambda each: each.total_bytes)
    share = backend.options.get("engine", {}).get("gpu_memory_utilization")
    whole = max(1.0, backend.num_gpus) * gpu.total_bytes
    if share is not None and share > min(1.0, backend.num_gpus) + 1e-6:
        said = (
            f"gpu_memory_utilization {share:g} is more than its actors hold of a GPU ({backend.num_gpus:g}): "
            "whoever shares the GPU has no room"
        )
        mend = (
            f"lower {protocol}.options.engine.gpu_memory_utilization below {backend.num_gpus:g}, "
            "or raise num_gpus"
        )
        return Finding(title, FAIL, said, mend)
    budget = whole * share if share is not None else backend.num_gpus * gpu.total_bytes
    said = f"{weights}, budget {budget / 1e9:.1f} GB of {gpu.name}"
    left = budget - weight_bytes
    if left <= 0:
        mend = f"raise {protocol}.num_gpus or gpu_memory_utilization, or use larger GPUs"
        return Finding(title, FAIL, f"{said}: they do not fit", mend)
    said += f", {left / 1e9:.1f} GB left for caches and activations"
    if left < _TIGHT * budget:
        return Finding(title, WARN, said, "tight: smaller batches, or a larger share of the GPU")
    return Finding(title, OK, said)


# Sources and output.


def output(config: BuildConfig, nodes: list[Node]) -> Iterator[Finding]:
    """Whether `out` can be written, is seen by every node, and has room. Leaves nothing behind."""
    out = Path(config.out)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    mark = out / f".doctor-{uuid.uuid4().hex}"
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            mark.write_text("seen")
        except OSError as error:
            yield Finding("out", FAIL, f"{out}: {one_line(error)}", "name a folder that this user may write")
            return
        yield Finding("out", OK, f"{out} can be written")
        blind = [node.host for node in nodes if not _sees(node, str(mark))]
        if blind:
            mend = "name a folder that every node mounts at this path"
            yield Finding("out", FAIL, f"{out} is not the same folder on {', '.join(blind)}", mend)
        elif nodes:
            yield Finding("out", OK, f"seen from {len(nodes)} nodes")
        yield from _room(config)
    finally:
        with suppress(OSError):  # a folder that was not made, or that another process has used since
            mark.unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()


def _sees(node: Node, path: str) -> bool:
    try:
        return bool(_remotely(os.path.exists, node, {})(path))
    except Exception:  # noqa: BLE001 - a node that does not answer sees nothing
        return False


def _room(config: BuildConfig) -> Iterator[Finding]:
    """Free space against what the plans say; where there is none yet, against `min_free_gb` alone."""
    for subset in config.subsets:
        try:
            planned = plans.load_plan(Path(config.out) / subset)
            driver.check_disk(config, subset, list(range(planned.num_units)), planned)
        except IntegrityError:  # no plan yet
            continue
        except ConfigError as error:
            said, _, mend = str(error).partition("; ")
            yield Finding("disk", FAIL, said, mend)
            return
    free = shutil.disk_usage(config.out).free
    said = f"{free / 1e9:.1f} GB free"
    if free < config.failures.min_free_gb * 1e9:
        yield Finding(
            "disk", FAIL, f"{said}, failures.min_free_gb is {config.failures.min_free_gb:g}", "free space"
        )
    else:
        yield Finding("disk", OK, said)


# On the cluster.


def _nodes() -> list[Node]:
    import ray

    found = []
    for node in ray.nodes():
        if node["Alive"]:
            bare = Node(node["NodeID"], node["NodeManagerHostname"], [])
            found.append(Node(bare.id, bare.host, _remotely(_all_gpus, bare, {})()))
    return found


def _all_gpus() -> list[Gpu]:
    """Of the node: Ray hides them from a task that asks for none."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return gpus.seen()


def _remotely(function: Callable, node: Node, runtime_env: dict[str, Any]) -> Callable:
    """The function as a Ray task on that node, which takes up nothing there."""
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        runtime_env=runtime_env or None,
    )

    def look_there(*given: Any) -> Any:
        waiting = task.remote(*given)
        try:
            return ray.get(waiting, timeout=_LOOK_S)
        except GetTimeoutError:
            ray.cancel(waiting, force=True)  # else the cluster tries for as long as we are connected
            raise

    return look_there
