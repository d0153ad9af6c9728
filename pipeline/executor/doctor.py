"""Checks everything that a build needs before it starts, and reports all problems at once with their fixes.

Nothing is loaded and nothing is built: packages are read from their metadata, checkpoints from their headers,
sources from their lists. With a cluster's address a stage is checked where it will run: on a node with a GPU
if it asks for one, and in its own `runtime_env`.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ...schemas.config import Backend, BuildConfig
from ...schemas.errors import ConfigError, IntegrityError, one_line
from ..corpus.work_list_summary import load_work_list
from ..io import bucket_checks, disk_errors, files, own_modules, scratch
from ..io.bucket_clients import place_of, variables_set
from ..io.failures import RETRYING, ReadError
from ..io.location import is_bucket, locate
from ..io.store import store_of
from ..models import registry
from ..stages.recipes import used_backends
from . import driver, gpus, ray_data
from .estimate.pools import find_pools
from .findings import FAIL, OK, WARN, Finding, failed, try_check
from .gpus import MANY_POOLS, Gpu
from .packages import check_backend_packages, check_python_and_base
from .preflight import check_sources, check_stages, inspect_backend

_WORKING_SHARE = 0.1
"""The share of its memory budget that a stage should have for activations and caches, besides its weights."""

_REMOTE_CHECK_S = 300.0
"""How long a check on a node may take; a `runtime_env` is made in this time."""


class Node(msgspec.Struct, frozen=True):
    """A machine of the cluster, or this one (its `id` is then "")."""

    id: str
    host: str
    gpus: list[Gpu]


def examine_build(config: BuildConfig, ray_address: str | None = None) -> list[Finding]:
    """Run every check, in the order in which a build would fail on them. Never raises for what it checks.

    Args:
        config: of the build.
        ray_address: "auto" or host:port of the cluster; None checks this machine alone.
    """
    findings = [*check_python_and_base()]
    nodes = [Node("", socket.gethostname(), gpus.list_gpus())]
    if ray_address is not None:
        try:
            ray_data.RayEngine(ray_address).start(config)
            nodes = _list_nodes()
            hosts = ", ".join(f"{node.host} ({len(node.gpus)} GPUs)" for node in nodes)
            findings.append(Finding("cluster", OK, f"{len(nodes)} nodes: {hosts}"))
        except Exception as error:  # noqa: BLE001 - whatever Ray raises, the other checks go on
            fix = "see docs/cluster.md; the other checks were made on this machine only"
            findings.append(Finding("cluster", FAIL, f"{ray_address}: {one_line(error)}", fix))
            ray_address = None
    on_cluster = ray_address is not None
    used = used_backends(config)
    for protocol, backend in used.values() if on_cluster else ():
        with suppress(ConfigError):  # said below
            registry.find_backend(protocol, backend)  # so that the nodes get its module
    findings += check_resources(config, nodes, on_cluster)
    for place, (protocol, backend) in used.items():
        findings += _check_stage(protocol, backend, nodes, on_cluster, place)
    findings += check_stages(config)
    findings += check_sources(config)
    findings += check_output_on_nodes(config, nodes if on_cluster else [])
    return findings


# GPUs and CPUs.


def check_resources(config: BuildConfig, nodes: list[Node], on_cluster: bool) -> Iterator[Finding]:
    """Check that the smallest pools of every subset fit at once."""
    for subset in config.subsets:
        pools = find_pools(config, [subset])
        for kind in ("GPU", "CPU"):
            available = _available(kind, nodes, on_cluster)
            needed = sum(pool.min_actors * getattr(pool, f"num_{kind.lower()}s") for pool in pools)
            if not needed:
                continue
            subject = f"{subset} {kind}s"
            found = (
                f"with the fewest actors, the stages need {needed:g} {kind}s at once; {available:g} are "
                "available"
            )
            if needed <= available + 1e-6:
                yield Finding(subject, OK, found)
            elif kind == "CPU" and not on_cluster:
                yield Finding(subject, OK, f"{found}, which the actors share on one machine")
            else:
                fix = "lower `concurrency`, num_gpus or num_cpus of a model, or add nodes"
                if kind == "GPU":
                    fix = f"{MANY_POOLS}; or add nodes"
                if kind == "GPU" and not on_cluster:
                    fix += "; to check a cluster, give --ray-address"
                yield Finding(subject, FAIL, found, fix)


def _available(kind: str, nodes: list[Node], on_cluster: bool) -> float:
    if on_cluster:
        import ray

        return float(ray.cluster_resources().get(kind, 0))
    return float(len(nodes[0].gpus) if kind == "GPU" else len(os.sched_getaffinity(0)))


# A stage's model.


def _check_stage(
    protocol: str, backend: Backend, nodes: list[Node], on_cluster: bool, place: str
) -> list[Finding]:
    """Check one backend where its actors will run."""
    all_gpus = [gpu for node in nodes for gpu in node.gpus]
    subject = f"{place} {backend.name}"
    if not on_cluster:
        if backend.runtime_env:
            fix = "run the doctor with --ray-address, so that Ray creates that environment"
            return [Finding(subject, WARN, "not checked: the stage has its own runtime_env", fix)]
        return check_backend(protocol, backend, all_gpus, place)
    node = next((node for node in nodes if node.gpus), nodes[0]) if backend.num_gpus else nodes[0]
    try:
        check = _on_node(_check_on_node, node, backend.runtime_env)
        return check(own_modules.taken(), protocol, backend, all_gpus, place)
    except Exception as error:  # noqa: BLE001 - an environment that cannot be made is a finding
        fix = (
            "correct the stage's `runtime_env`: it needs this project, and Ray in this version"
            if backend.runtime_env
            else "the node needs the same Python environment as this one"
        )
        return [Finding(subject, FAIL, f"on {node.host}: {one_line(error)}", fix)]


def _check_on_node(
    modules: list[own_modules.OwnModule], protocol: str, backend: Backend, available: list[Gpu], place: str
) -> list[Finding]:
    own_modules.install(modules)
    return check_backend(protocol, backend, available, place)


def check_backend(protocol: str, backend: Backend, available: list[Gpu], place: str = "") -> list[Finding]:
    """Check the packages, the checkpoint and the memory of one backend, in this process.

    Args:
        protocol: a key of `registry.BACKENDS`, such as "captioner".
        backend: from the configuration.
        available: the GPUs that its actors will run on.
        place: where it stands in the configuration; by default under the protocol's name.
    """
    place = place or protocol
    subject = f"{place} {backend.name}"
    findings = [*check_backend_packages(protocol, backend)]
    try:
        checked = inspect_backend(protocol, backend)
    except Exception as error:  # noqa: BLE001 - a backend of the user's may raise anything
        return [*findings, failed(subject, error, f"correct `{place}` in the configuration")]
    if checked is None:
        found = "its options fit; nothing else can be checked without loading it"
        return [*findings, Finding(subject, OK, found)]
    findings += [Finding(subject, OK, found) for found in (checked.what, *checked.notes)]
    if checked.weight_bytes:
        findings.append(check_memory(place, backend, checked.weight_bytes, available))
    return findings


def check_memory(place: str, backend: Backend, weight_bytes: int, available: list[Gpu]) -> Finding:
    """Check that an actor's weights fit into its share of the smallest GPU, with room to work.

    vLLM takes `options.engine.gpu_memory_utilization` of a whole GPU, whatever share of it the actor holds.
    """
    subject = f"{place} memory"
    weights = f"{weight_bytes / 1e9:.1f} GB of weights"
    if not backend.num_gpus:
        return _check_main_memory(place, backend, weight_bytes)
    if not available:
        fix = "run this on a GPU node, or with --ray-address"
        return Finding(subject, WARN, f"{weights}; there is no GPU here to compare with", fix)
    gpu = min(available, key=lambda each: each.total_bytes)
    share = backend.options.get("engine", {}).get("gpu_memory_utilization")
    if share is not None and share > min(1.0, backend.num_gpus) + 1e-6:
        found = (
            f"gpu_memory_utilization is {share:g}, but an actor holds only {backend.num_gpus:g} of a GPU "
            "(num_gpus): other actors on that GPU would have no memory left"
        )
        fix = (
            f"lower {place}.options.engine.gpu_memory_utilization to {min(1.0, backend.num_gpus):g} or "
            "less, "
            f"or raise {place}.num_gpus"
        )
        return Finding(subject, FAIL, found, fix)
    held = backend.num_gpus if share is None else max(1.0, backend.num_gpus) * share
    budget = held * gpu.total_bytes
    left = budget - weight_bytes
    found = f"{weights}, budget {budget / 1e9:.1f} GB of {gpu.name}"
    if left <= 0:
        fix = f"raise {place}.num_gpus or gpu_memory_utilization, or use larger GPUs"
        return Finding(subject, FAIL, f"{found}: they do not fit", fix)
    found += f", {left / 1e9:.1f} GB left for caches and activations"
    if left < _WORKING_SHARE * budget:
        return Finding(subject, WARN, found, f"tight: lower {place}.batch_images, or raise {place}.num_gpus")
    return Finding(subject, OK, found)


def _check_main_memory(place: str, backend: Backend, weight_bytes: int) -> Finding:
    import psutil

    total = psutil.virtual_memory().total
    actors = backend.concurrency[0]
    found = f"{weight_bytes / 1e9:.1f} GB of weights x {actors} actors in {total / 1e9:.0f} GB of main memory"
    if weight_bytes * actors > total:
        fix = f"lower {place}.concurrency, or give it a GPU"
        return Finding(f"{place} memory", FAIL, found, fix)
    if weight_bytes * actors > 0.7 * total:
        fix = f"the weights fill more than 70% of main memory: lower {place}.concurrency"
        return Finding(f"{place} memory", WARN, found, fix)
    return Finding(f"{place} memory", OK, found)


# The output.


def check_output_on_nodes(config: BuildConfig, nodes: list[Node]) -> Iterator[Finding]:
    """Check that `out` can be written, is the same folder on every node, and has room. It leaves no file."""
    if is_bucket(config.out):
        yield from _check_bucket(config, nodes)
        return
    out = Path(config.out)
    created = [folder for folder in (out, *out.parents) if not files.exists(folder)]
    probe = out / f".doctor-{uuid.uuid4().hex}"
    try:
        try:
            store_of(out).make_folder(str(out))  # `create` says it, too, where there are no hard links
            store_of(out).create(str(probe), b"written by `paracaption doctor`, which removes it")
        except OSError as error:
            yield Finding("out", FAIL, f"{out}: {one_line(error)}", "name a folder that this user may write")
            return
        yield Finding("out", OK, f"{out} can be written")
        blind = [node.host for node in nodes if not _has_file(node, str(probe))]
        if blind:
            fix = "name a folder that every node mounts at this path"
            yield Finding("out", FAIL, f"{out} is not the same folder on {', '.join(blind)}", fix)
        elif nodes:
            yield Finding("out", OK, f"the same folder on {len(nodes)} nodes")
        yield from _check_disk(config)
    finally:
        with suppress(OSError):  # a folder that was not made, or that another process has used since
            store_of(out).delete(str(probe))
            for folder in created:
                folder.rmdir()


def _check_bucket(config: BuildConfig, nodes: list[Node]) -> Iterator[Finding]:
    """Check the bucket and scratch from here, and from every node of a cluster."""
    yield from _look_at_bucket(config.out, config.failures.min_free_gb)
    variables = variables_set(place_of(config.out).scheme)
    for node in nodes:
        where = f" on {node.host}"
        try:
            look = _on_node(_look_at_bucket, node, {})
            yield from look(config.out, config.failures.min_free_gb, where, variables)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises, the other nodes are looked at
            yield failed(f"out{where}", error, "the node needs the same Python environment as this one")


def _look_at_bucket(
    out: str, min_free_gb: float, where: str = "", variables_there: Collection[str] = ()
) -> list[Finding]:
    """Check that a bucket keeps its promises, as this process sees it, and that scratch has room.

    Args:
        out: the corpus.
        min_free_gb: what scratch should have.
        where: is put after the subjects, as in "out on node-2".
        variables_there: names of the variables that lead to the bucket where the doctor was called.
    """
    missing = [name for name in variables_there if not os.environ.get(name)]
    fix = "correct `out` or the store's credentials (docs/buckets.md)"
    found = try_check(f"out{where}", fix, _try_bucket, out)
    if found.state == FAIL and missing:
        found = msgspec.structs.replace(found, fix=f"{found.fix}; not set there: {', '.join(missing)}")
    return [found, _check_scratch(f"scratch{where}", out, min_free_gb)]


def _try_bucket(out: str) -> str:
    bucket_checks.refuse_secrets(out)
    budget = RETRYING.budget_s
    RETRYING.set_budget(0)  # the client asks a few times itself; somebody waits for the answer
    try:
        bucket_checks.check_store(out)
    except ReadError as error:
        raise ConfigError(str(disk_errors.to_line(error))) from error
    finally:
        RETRYING.set_budget(budget)
    return f"{out} can be written, and creates a name once"


def _check_scratch(subject: str, out: str, min_free_gb: float) -> Finding:
    try:
        folder = scratch.folder_of(out)
        free = shutil.disk_usage(folder).free
    except (OSError, ConfigError) as error:
        return failed(subject, error, f"set {scratch.VARIABLE} to a folder of this machine")
    found = f"{free / 1e9:.1f} GB free in {folder}"
    if free < min_free_gb * 1e9:
        fix = f"free space, or set {scratch.VARIABLE} to a folder with more room"
        return Finding(subject, WARN, found, fix)
    return Finding(subject, OK, found)


def _has_file(node: Node, path: str) -> bool:
    try:
        return bool(_on_node(os.path.exists, node, {})(path))
    except Exception:  # noqa: BLE001 - a node that does not answer has no file
        return False


def _check_disk(config: BuildConfig) -> Iterator[Finding]:
    """Compare free space with what the work lists need; without a work list, with `min_free_gb` alone."""
    for subset in config.subsets:
        try:
            planned = load_work_list(locate(config.out) / subset)
            driver.check_disk(config, {subset: driver.Pending(planned, list(range(planned.num_units)))})
        except IntegrityError:  # nothing is planned yet
            continue
        except ConfigError as error:
            yield failed("disk", error, "free space")
            return
    free = shutil.disk_usage(config.out).free
    found = f"{free / 1e9:.1f} GB free"
    if free < config.failures.min_free_gb * 1e9:
        found += f", failures.min_free_gb is {config.failures.min_free_gb:g}"
        fix = "delete files on that disk, choose another `out`, or lower failures.min_free_gb"
        yield Finding("disk", FAIL, found, fix)
    else:
        yield Finding("disk", OK, found)


# The cluster.


def _list_nodes() -> list[Node]:
    import ray

    found = []
    for node in ray.nodes():
        if node["Alive"]:
            bare = Node(node["NodeID"], node["NodeManagerHostname"], [])
            found.append(Node(bare.id, bare.host, _on_node(_list_all_gpus, bare, {})()))
    return found


def _list_all_gpus() -> list[Gpu]:
    """All GPUs of the node, which Ray hides from a task that asks for none."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return gpus.list_gpus()


def _on_node(function: Callable, node: Node, runtime_env: dict[str, Any]) -> Callable:
    """The function as a Ray task on that node, which takes up no resources there."""
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        runtime_env=runtime_env or None,
    )

    def call(*arguments: Any) -> Any:
        result = task.remote(*arguments)
        try:
            return ray.get(result, timeout=_REMOTE_CHECK_S)
        except GetTimeoutError:
            ray.cancel(result, force=True)  # else the cluster tries for as long as we are connected
            raise

    return call
