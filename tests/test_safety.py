"""No file of ours runs code that came with a checkpoint."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("schemas", "filters", "pipeline", "flows", "model_training", "benchmarks", "tests")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
ALLOWED = {
    "tests/flows/test_build_flow.py",
    "tests/pipeline/corpus/test_reader.py",
    "tests/pipeline/models/test_sam.py",
}
"""They unpickle what they have just pickled themselves."""
REFUSALS = {"tests/pipeline/models/test_gar.py", "tests/pipeline/models/test_vllm_judge.py"}
"""They hand a backend the forbidden option, to see it refused."""


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
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, of = node.func.attr, ast.unparse(node.func.value).split(".")[0]
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
            found += dangers(path.read_text(encoding="utf-8"), name)
    assert [line for line in found if line.rpartition(":")[0] not in REFUSALS] == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trusted)",
        "settings = {'trust_remote_code': True}",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "pickle.Unpickler(file)",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
    ],
)
def test_the_search_finds(source):
    assert len(dangers(source, "a.py")) == 1


def test_the_search_lets_pass():
    assert dangers("torch.load(p, weights_only=True); np.load(p); f(trust_remote_code=False)", "a.py") == []
