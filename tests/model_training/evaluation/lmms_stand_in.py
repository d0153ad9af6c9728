"""A package in place of lmms-eval, where it is not installed: it asks nothing, and leaves what that would.

Its command writes results as lmms-eval 0.7.3 does, or prints what that printed and exits with 0 without any,
by the name of the task. It says that an answer took a quarter of a second, and starting half a second.
`test_lmms.py` runs the real one.
"""

from __future__ import annotations

from pathlib import Path

_MAIN = """
import json, pathlib, sys
given = dict(zip(sys.argv[1:], sys.argv[2:]))
task = given["--tasks"]
with open("calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
results = pathlib.Path(given["--output_path"])
if task == "gated":
    print("Traceback (most recent call last):")
    print("datasets.exceptions.DatasetNotFoundError: Dataset 'a/b' is a gated dataset on the Hub.")
    print("\\x1b[31mERROR\\x1b[0m | cli_evaluate:615 - Error during evaluation: RetryError[<Future raised>]. "
          "Please set `--verbosity=DEBUG` to get more information.")
elif task == "broken":
    print("Traceback (most recent call last):")
    print("KeyError: 'answer'")
    print("ERROR | Error during evaluation: 'answer'. Please set `--verbosity=DEBUG` to get more "
          "information.")
elif task == "killed":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
else:
    results.mkdir()
    score = "N/A" if task == "empty" else 0.625
    found = {"alias": task, "right,none": score, "right_stderr,none": 0.1, "right_stderr_clt,none": 0.1}
    asked = min(8, int(given.get("--limit", 8)))
    content = {"results": {task: found}, "n-samples": {task: {"original": 9, "effective": asked}}}
    content["throughput"] = {"total_elapsed_time": 0.25 * asked, "avg_startup_seconds": 0.5}
    (results / "20260101_000000_results.json").write_text(json.dumps(content))
    target = ["a cat", "cats"]
    lines = [{"doc_id": n, "target": target, "filtered_resps": [f"{n} a cat"]} for n in range(asked)]
    samples = results / f"20260101_000000_samples_{task}.jsonl"
    samples.write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def write_package(folder: Path) -> Path:
    """Write the package, with a version, into a folder for `sys.path`."""
    (folder / "lmms_eval").mkdir(parents=True)
    (folder / "lmms_eval" / "__init__.py").touch()
    (folder / "lmms_eval" / "__main__.py").write_text(_MAIN)
    about = folder / "lmms_eval-0.7.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lmms-eval\nVersion: 0.7.3\n")
    return folder
