"""A hub on loopback that takes uploads of `huggingface_hub`, and says what it was given."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = (".tar", ".parquet", ".sqlite", ".idx", ".safetensors")
"""What the hub stores as LFS files; the others are sent within the commit."""


class Hub(ThreadingHTTPServer):
    """Attributes:
    cards: the cards that it was asked to check.
    stored: the LFS files by their SHA-256.
    committed: the files of the commit by name.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cards: list[dict[str, Any]] = []
        self.stored: dict[str, bytes] = {}
        self.committed: dict[str, bytes] = {}

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def upload(self, folder: Path, kind: str) -> None:
        """Upload a folder with `HfApi.upload_folder` in a process of its own."""
        code = (
            "import sys; from huggingface_hub import HfApi\n"
            "HfApi(token='none').upload_folder(repo_id='a/b', folder_path=sys.argv[1], repo_type=sys.argv[2])"
        )
        env = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            **{"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        }
        command = [sys.executable, "-c", code, str(folder), kind]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        body, here = self._body(), f"http://{self.headers['Host']}"
        if "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(LARGE) else "regular" for name in names]
            self._answer(
                {
                    "files": [
                        {"path": name, "uploadMode": mode, "shouldIgnore": False}
                        for name, mode in zip(names, modes, strict=True)
                    ]
                }
            )
        elif self.path.endswith("/objects/batch"):
            asked = json.loads(body)["objects"]
            objects = [
                {**each, "actions": {"upload": {"href": f"{here}/put/{each['oid']}"}}} for each in asked
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                given = json.loads(line)
                value = given["value"]
                if given["key"] == "file":
                    self.server.committed[value["path"]] = base64.b64decode(value["content"])
                elif given["key"] == "lfsFile":
                    self.server.committed[value["path"]] = self.server.stored[value["oid"]]
            oid = "1" * 40
            self._answer({"commitUrl": f"{here}/a/b/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})
        else:
            self.server.cards.append(json.loads(body))
            self._answer({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        self.server.stored[hashlib.sha256(data).hexdigest()] = data
        self._answer({})
