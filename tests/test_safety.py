"""No file of ours runs code that came with a checkpoint, and a corpus has one door for all I/O."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("schemas", "filters", "pipeline", "flows", "model_training", "benchmarks", "tests")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
TORCH_UNPICKLERS = {"FileSystemReader", "DefaultLoadPlanner", "HuggingFaceStorageReader"}
"""What torch reads checkpoints with; `train/checkpoint_files.py` has what reads the same as data."""
ALLOWED = {
    "tests/flows/test_build_flow.py",
    "tests/pipeline/executor/test_ray_data.py",
    "tests/model_training/data/test_strangers.py",
    "tests/pipeline/corpus/test_reader.py",
    "tests/pipeline/models/test_sam.py",
    "tests/test_hostile_models.py",
}
"""They unpickle what they have just pickled themselves."""
REFUSALS = {
    *("tests/pipeline/models/test_gar.py", "tests/pipeline/models/test_vllm_judge.py"),
    "tests/test_hostile_models.py",
}
"""They hand over the forbidden option, to see it refused."""


OUR_CLASSES = {"PerceptionDLMProcessor"}
"""Its own `from_pretrained` says it to transformers."""
IMPORTERS = {
    "flows/launch.py": "the module of one of our flows",
    "pipeline/io/own_modules.py": "a backend or source: ours, or one that the user's configuration names "
    "(flows/served.py)",
    "benchmarks/gpu/child.py": "the module of a measurement",
}
"""Files that import a module by a name that is not in their source."""
FOR_TESTS = ("without trust_remote_code=False", "imports what data may name", "exec", "eval")
"""What tests may do: they load what they have just written themselves."""


def dangers(source: str, name: str) -> list[str]:
    """Calls that may run a checkpoint's code, as "file:line what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            given = {k.value: v for k, v in pairs if isinstance(k, ast.Constant) and isinstance(k.value, str)}
        elif isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        else:
            continue
        trusted = given.get("trust_remote_code")
        if trusted is not None and not (isinstance(trusted, ast.Constant) and trusted.value is False):
            found.append(f"{name}:{node.lineno} trust_remote_code")
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Name) and function.id in ("eval", "exec"):
            found.append(f"{name}:{node.lineno} {function.id}")
        if getattr(function, "attr", getattr(function, "id", None)) in TORCH_UNPICKLERS:
            found.append(f"{name}:{node.lineno} unpickles")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, of = node.func.attr, ast.unparse(node.func.value).split(".")[0]
        if called in ("from_pretrained", "from_config") and of not in OUR_CLASSES and trusted is None:
            found.append(f"{name}:{node.lineno} {called} without trust_remote_code=False")
        if (of, called) == ("importlib", "import_module") and not isinstance(node.args[0], ast.Constant):
            found.append(f"{name}:{node.lineno} imports what data may name")
        safe = given.get("weights_only")
        if (of, called) == ("torch", "load") and not (isinstance(safe, ast.Constant) and safe.value is True):
            found.append(f"{name}:{node.lineno} torch.load without weights_only=True")
        unpickles = called in {"load", "loads", "Unpickler"} and of in UNPICKLERS
        allows = (
            called in {"load", "memmap"}
            and "allow_pickle" in given
            and ast.unparse(given["allow_pickle"]) != "False"
        )
        if (unpickles and name not in ALLOWED) or allows or called == "read_pickle":
            found.append(f"{name}:{node.lineno} unpickles")
    return found


def test_no_file_trusts_remote_code_or_unpickles():
    files = [path for folder in OURS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if name != "tests/test_safety.py":
            lines = dangers(path.read_text(encoding="utf-8"), name)
            if name.startswith("tests/"):
                lines = [line for line in lines if not line.endswith(FOR_TESTS)]
            if name in IMPORTERS:
                lines = [line for line in lines if not line.endswith("imports what data may name")]
            found += lines
    assert [line for line in found if line.rpartition(":")[0] not in REFUSALS] == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trusted)",
        "settings = {'trust_remote_code': True}",
        "AutoTokenizer.from_pretrained(x)",
        "AutoModel.from_config(x, dtype=y)",
        "importlib.import_module(name)",
        "torch.hub.load(x, y)",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "pickle.Unpickler(file)",
        "load(state, storage_reader=FileSystemReader(path))",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
    ],
)
def test_the_search_finds(source):
    assert len(dangers(source, "a.py")) == 1


def test_the_search_lets_pass():
    assert dangers("torch.load(p, weights_only=True); np.load(p); f(trust_remote_code=False)", "a.py") == []
    fine = "AutoModel.from_pretrained(p, trust_remote_code=False); PerceptionDLMProcessor.from_pretrained(p)"
    assert dangers(fine + "; model.eval(); importlib.import_module('cv2')", "a.py") == []


# One door: `pipeline/io` alone reads and writes what is a corpus or a source. ruff's `banned-api` finds what
# has a name in a module; it cannot see the builtin `open`, the methods of a `Path`, or a path for pyarrow.

ELSEWHERE = {
    "pipeline/config_file.py": "the configuration, a file that the command line names",
    "pipeline/corpus/events.py": "events of a run, from which nothing is decided",
    "pipeline/corpus/energon.py": "an export, in a temporary folder that is no corpus",
    "pipeline/corpus/export.py": "an export, in a temporary folder that is no corpus",
    "pipeline/corpus/hub.py": "an export, in a temporary folder that is no corpus",
    "pipeline/corpus/hub_shards.py": "an export, in a temporary folder that is no corpus",
    "pipeline/corpus/hub_unfinished.py": "an export, in a temporary folder that is no corpus",
    "pipeline/corpus/work_list_table.py": "a work list in a scratch folder, before it is published",
    "pipeline/executor/doctor.py": "removes the folders that it has made, if they are still empty",
    "pipeline/executor/driver.py": "a scratch folder for plans",
    "pipeline/executor/in_flight.py": "notes of what is in flight, which a worker leaves for the next one",
    "pipeline/executor/preflight.py": "the tokenizer of a checkpoint",
    "pipeline/executor/run_folders.py": "stacks and notes of a run",
    "pipeline/executor/stalls.py": "stacks of what hangs",
    "pipeline/explorer/app.py": "files of the package",
    "pipeline/explorer/report.py": "files of the package",
    "pipeline/explorer/reviews.py": "the lock beside the reviews",
    "pipeline/explorer/training.py": "a training run, which is no corpus",
    "pipeline/models/embedded/lexical.py": "files of the package",
    "pipeline/models/gar/checkpoint.py": "a checkpoint",
    "pipeline/models/gar/export.py": "a checkpoint",
    "pipeline/models/gar/prompt.py": "a checkpoint",
    "pipeline/models/prompts/__init__.py": "files of the package",
    "pipeline/models/sam.py": "a checkpoint",
    "pipeline/models/sam3.py": "a checkpoint",
    "pipeline/models/vllm_judge.py": "a checkpoint",
    "pipeline/sources/categories.py": "files of the package",
}
"""Files that read or write something else, and what it is."""

PATH_METHODS = {
    *("chmod", "exists", "glob", "hardlink_to", "is_dir", "is_file", "iterdir", "lstat", "mkdir", "open"),
    *("read_bytes", "read_text", "rename", "rglob", "rmdir", "stat", "symlink_to", "touch", "unlink", "walk"),
    *("write_bytes", "write_text"),
}
DOORS = {"files", "store", "log", "commit_log", "owner", "self", "Image", "tarfile"}
"""Names whose methods of the same names are no methods of a `Path`."""
HANDED_A_FILE = {"ParquetWriter": 0, "write_table": 1}
"""Functions of pyarrow that would write a path by themselves, and which of their arguments it would be."""
HANDED_MEMORY = {"ParquetFile", "read_table", "read_schema", "read_metadata"}
"""Functions of pyarrow that read a file in threads of their own; pipeline/io/tables.py says why not to."""


def side_doors(source: str, name: str) -> list[str]:
    """Calls that read or write files by a path, as "file:line what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            called, of = node.func.id, ""
        elif isinstance(node.func, ast.Attribute):
            called, of = node.func.attr, ast.unparse(node.func.value)
        else:
            continue
        door = of in DOORS or of.startswith("store_of(")
        if (called == "open" and not of) or (of and called in PATH_METHODS and not door):
            found.append(f"{name}:{node.lineno} {called}")
        elif (of, called) == ("tarfile", "open") and "fileobj" not in {each.arg for each in node.keywords}:
            found.append(f"{name}:{node.lineno} tarfile.open of a path")
        elif of == "pq" and called in HANDED_A_FILE:
            at = HANDED_A_FILE[called]
            given = ast.unparse(node.args[at]) if len(node.args) > at else ""
            if given not in ("file", "buffer"):
                found.append(f"{name}:{node.lineno} {called} of a path")
        elif of == "pq" and called in HANDED_MEMORY:
            if not (node.args and ast.unparse(node.args[0]).startswith("pa.BufferReader(")):
                found.append(f"{name}:{node.lineno} {called} of a file")
    return found


@pytest.mark.soak
def test_a_corpus_and_its_sources_are_read_and_written_through_one_door():
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("pipeline/io/") and (lines := side_doors(path.read_text("utf-8"), name)):
            found[name] = lines
    assert [line for name, lines in found.items() if name not in ELSEWHERE for line in lines] == []
    assert sorted(set(ELSEWHERE) - set(found)) == [], "these have no reason to be listed any more"


@pytest.mark.soak
def test_parquet_is_read_by_the_thread_that_asks_in_every_room():
    found = []
    for folder in ("pipeline", "model_training", "flows"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += [line for line in side_doors(path.read_text("utf-8"), path.name) if "of a file" in line]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'wb')",
        "with open(path) as file: pass",
        "(out / 'log').mkdir()",
        "Path(out).read_text()",
        "path.open('rb')",
        "path.exists()",
        "path.stat().st_size",
        "[each for each in folder.glob('*')]",
        "path.unlink(missing_ok=True)",
        "tarfile.open(path)",
        "pq.ParquetFile(path)",
        "pq.ParquetFile(file)",
        "pq.read_table(source=path)",
        "pq.write_table(table, path)",
    ],
)
def test_the_search_finds_a_side_door(source):
    assert len(side_doors(source, "a.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "files.exists(path)",
        "store_of(out).delete(path)",
        "Image.open(buffer)",
        "tarfile.open(fileobj=file, mode='r:')",
        "pq.write_table(table, file)",
        "pq.ParquetFile(pa.BufferReader(data))",
        "text.replace('a', 'b')",
    ],
)
def test_the_search_leaves_the_door_alone(source):
    assert side_doors(source, "a.py") == []


def test_ruff_refuses_what_has_a_name():
    source = "import os\n\nos.replace(1, 2)\n"
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "-"]

    def refuses(name: str) -> bool:
        return (
            b"TID251"
            in subprocess.run(
                [*command, "--stdin-filename", name], input=source.encode(), capture_output=True, cwd=ROOT
            ).stdout
        )

    assert refuses("pipeline/corpus/planted.py")
    assert not refuses("pipeline/io/planted.py")
