"""`docker/`: what can be told about the images without docker, and what their RUN commands install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
IMAGES = ["Dockerfile", "Dockerfile.gpu"]
PAGE = ROOT / "docs" / "containers.md"

pytestmark = pytest.mark.skipif(not (ROOT / "docker").exists(), reason="no clone, but an installed wheel")


def instructions(image: str) -> list[tuple[str, str]]:
    """(instruction, its text) in order, with continued lines joined and comments left out."""
    text = (ROOT / "docker" / image).read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line.strip()]  # pyright: ignore


def runs(image: str) -> list[tuple[list[dict[str, str]], str]]:
    """(mounts, command) of each RUN."""
    found = []
    for name, text in instructions(image):
        if name == "RUN":
            mounts = re.findall(r"--mount=(\S+)", text)
            options = [dict(part.partition("=")[::2] for part in mount.split(",")) for mount in mounts]
            found.append((options, re.sub(r"--mount=\S+\s*", "", text).strip()))
    return found


def environment(image: str) -> dict[str, str]:
    texts = [text for name, text in instructions(image) if name == "ENV"]
    return dict(each.split("=", 1) for text in texts for each in text.split())


@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_takes_from_the_clone_is_there_and_is_sent_to_docker(image):
    bound = [mount for mounts, _ in runs(image) for mount in mounts if mount.get("type") == "bind"]
    sources = [mount["source"] for mount in bound]
    copied = [text.split()[:-1] for name, text in instructions(image) if name in ("COPY", "ADD")]
    sources += [each for one in copied for each in one if not each.startswith("--")]
    sent = (ROOT / "docker" / f"{image}.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in sent if line.startswith("!")}
    assert "." in sources and "*" in sent
    for source in sources:
        assert (ROOT / source).exists() and (source == "." or source in allowed), source
    assert all((ROOT / each).exists() for each in allowed)
    package = {each.name for each in (ROOT / "paracaption").iterdir() if each.is_symlink()}
    assert package | {"paracaption", "pyproject.toml", "README.md", "LICENSE"} <= allowed


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_user_of_its_own_and_reports_nothing(image):
    given = instructions(image)
    names = [name for name, _ in given]
    users = [text for name, text in given if name == "USER"]
    assert users[-1] not in ("root", "0") and any(f" {users[-1]}" in command for _, command in runs(image))
    assert "RUN" not in names[names.index("USER") :]
    variables = environment(image)
    assert variables["DO_NOT_TRACK"] == "1" and variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert variables["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert image != "Dockerfile.gpu" or variables["VLLM_NO_USAGE_STATS"] == "1"
    assert names[-1] == "CMD" and "paracaption" in given[-1][1]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_made_of_published_images_with_fixed_versions_and_the_lock_file(image):
    named = [text.split()[0] for name, text in instructions(image) if name == "FROM"]
    named += [mount["from"] for mounts, _ in runs(image) for mount in mounts if "from" in mount]
    for each in named:
        assert re.fullmatch(r"(python|ghcr\.io/astral-sh/uv):\d+\.\d+[\w.-]*", each), each
    lock = "requirements-gpu.lock" if image.endswith("gpu") else "requirements.lock"
    installs = [command for _, command in runs(image) if "pip install" in command]
    assert [f"--constraint {lock}" in each or "--no-deps" in each for each in installs] == [True, True]
    text = (ROOT / "docker" / image).read_text()
    assert not re.search(r"index-url|INDEX_URL|PIP_|extra-index|trusted-host", text)


def test_the_two_lists_of_what_is_sent_to_docker_are_the_same():
    first, second = ((ROOT / "docker" / f"{image}.dockerignore").read_text() for image in IMAGES)
    assert first == second


def test_the_page_has_the_commands_that_the_files_begin_with():
    page = " ".join(PAGE.read_text().replace("\\\n", " ").split())
    for image in IMAGES:
        text = (ROOT / "docker" / image).read_text()
        comments = "\n".join(line[2:] for line in text.splitlines() if line.startswith("#   "))
        commands = comments.replace("\\\n", " ").strip()
        for command in re.split(r"(?=docker )", " ".join(commands.split())):
            assert command.strip() in page, command


def fresh(folder: Path, image: str) -> tuple[dict[str, str], Path]:
    """An empty environment where an image has its Python, and the source that is mounted into it."""
    source = folder / "src"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        target, wanted = source / name, ROOT / name
        if wanted.is_symlink() or wanted.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(wanted, target, follow_symlinks=False)
    (version,) = re.findall(r"FROM python:(\d+\.\d+)", (ROOT / "docker" / image).read_text())
    subprocess.run([UV, "venv", "--quiet", "--python", version, folder / "venv"], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_"))}
    given = environment(image)
    for name in ("UV_SYSTEM_PYTHON", "UV_NO_CACHE"):  # the environment stands for the image's Python
        given.pop(name)
    path = f"{folder / 'venv' / 'bin'}:{Path(UV).parent}:{os.environ['PATH']}"
    return {**kept, **given, "VIRTUAL_ENV": str(folder / "venv"), "PATH": path}, source


def installs(image: str, source: Path) -> list[str]:
    return [
        command.replace("cd /src", f"cd {source}") for _, command in runs(image) if "pip install" in command
    ]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_commands_of_the_image_install_the_locked_versions_and_a_package_that_builds(tmp_path):
    env, source = fresh(tmp_path, "Dockerfile")
    for command in installs("Dockerfile", source):
        subprocess.run(["sh", "-ec", command], env=env, check=True, capture_output=True, timeout=900)
    shutil.rmtree(source)  # as in the image, where the source was only mounted
    frozen = subprocess.run([UV, "pip", "freeze"], env=env, capture_output=True, text=True, check=True).stdout
    locked = {line.split(" ;")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert [line for line in frozen.splitlines() if line not in locked] == [f"paracaption @ file://{source}"]
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(ROOT / "samples", work / "samples")
    config = (work / "samples" / "build.yaml").read_text().replace("../out/demo", "../out")
    (work / "samples" / "build.yaml").write_text(config)
    command = ["paracaption", "build", "samples/build.yaml", "--local"]
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "out" / "index.parquet").exists()
    assert subprocess.run(["ray", "--version"], env=env, capture_output=True, text=True).stdout.endswith(
        "2.60.0\n"
    )


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_commands_of_the_gpu_image_resolve_to_locked_versions_alone(tmp_path):
    env, source = fresh(tmp_path, "Dockerfile.gpu")
    dependencies, _ = installs("Dockerfile.gpu", source)
    done = subprocess.run(
        ["sh", "-ec", f"{dependencies} --dry-run"], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    would = re.findall(r"^ \+ (\S+)$", done.stderr, re.MULTILINE)
    locked = {line.split(" ;")[0] for line in (ROOT / "requirements-gpu.lock").read_text().splitlines()}
    assert {"vllm", "torch", "ray"} <= {line.split("==")[0] for line in would}
    assert [line for line in would if line not in locked] == []
