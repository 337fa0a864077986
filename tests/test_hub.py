"""Models on the hub: a local server with the part of its API that models need; real clients in other processes."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, child_environment, contents
from safetensors.torch import load_file
from test_checkpoint import of_kind, save_vocab_and_merges, transformers_model

from plaingpt.checkpoint import load_model
from plaingpt.console import UserError

LOAD = """
import sys, torch
from plaingpt.checkpoint import load_model
from plaingpt.console import UserError
for name in sys.argv[1:]:
    try:
        print(float(sum(p.double().abs().sum() for p in load_model(name)[0].parameters())))
    except UserError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """Repositories of `server.repositories`: {name: {commit: {file: bytes}}}; main is the last commit."""

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def commit(self, name: str, revision: str) -> tuple[str, dict]:
        commits = self.server.repositories.get(name)
        if commits == "gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if commits is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        commit = list(commits)[-1] if revision == "main" else self.server.tags.get(revision, revision)
        return (commit, commits[commit]) if commit in commits else self.answer(404, X_Error_Code="RevisionNotFound")

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            if found := self.commit(match[1], match[3]):
                commit, files = found
                names = [{"rfilename": file} for file in files]
                tree = [{"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                        for f, c in files.items()]  # fmt: skip
                body = tree if match[2] == "tree" else {"id": match[1], "sha": commit, "siblings": names}
                self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.commit(match[1], match[2]):
                commit, files = found
                if match[3] not in files:
                    return self.answer(404, X_Error_Code="EntryNotFound")
                content = files[match[3]]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(200, content, ETag=etag, X_Repo_Commit=commit)
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        url = f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {"0" * 40: {}})
            self.answer(200, json.dumps({"url": f"{url}/{name}", "id": name}).encode())
        elif path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.answer(200, json.dumps({"files": files, "commitOid": "0" * 40}).encode())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                     for line in lines if line["key"] == "file"}  # fmt: skip
            commit = hashlib.sha1(body).hexdigest()
            self.server.repositories[match[1]][commit] = files
            answer = {"commitOid": commit, "commitUrl": f"{url}/{match[1]}/commit/{commit}", "success": True}
            self.answer(200, json.dumps(answer).encode())
        else:  # among them the check of the card's metadata
            self.answer(200, b'{"errors": [], "warnings": []}')


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.tags, server.asked = {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def client(hub, tmp_path: Path, *command, **environment: str) -> subprocess.CompletedProcess:
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
    here |= {"HF_TOKEN": "hf_of_a_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = child_environment(**(here | environment))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)


def test_a_checkpoint_goes_to_the_hub_and_comes_back(tmp_path, hub, tiny_run):
    """`hf upload`, then `load_model` by name, by tag, and once more without a network, from the cache."""
    hf = Path(sys.executable).with_name("hf")
    if not hf.exists():
        hf = Path(os.path.realpath(sys.executable)).with_name("hf")
    uploaded = client(hub, tmp_path, hf, "upload", "me/mine", tiny_run / "best")
    assert uploaded.returncode == 0, uploaded.stderr
    (_, (commit, files)) = hub.repositories["me/mine"].items()
    assert files == contents(tiny_run / "best")
    total = sum(t.double().abs().sum() for t in load_file(tiny_run / "best" / "model.safetensors").values())
    other = files | {"config.json": json.dumps({"model_type": "llama"}).encode()}
    hub.repositories["some/llama"] = {"1" * 40: other}
    without = {name: content for name, content in files.items() if name != "model.safetensors"}
    hub.repositories["some/pickle"] = {"2" * 40: without | {"pytorch_model.bin": b"code"}}
    hub.tags["first"] = commit
    hub.repositories["me/mine"]["3" * 40] = without  # a later one, without weights
    hub.repositories["some/gated"] = "gated"
    names = ["me/mine@first", f"me/mine@{commit}", "me/mine", "me/mine@nowhere", "me/none", "some/llama", "some/pickle"]
    names += ["some/gated", "a/b/c"]
    online = client(hub, tmp_path, sys.executable, "-c", LOAD, *names, PYTHONPATH=str(ROOT))
    first, by_commit, later, nowhere, none, llama, pickled, gated, no_name = online.stdout.splitlines()
    assert float(first) == pytest.approx(float(total), rel=1e-6) and by_commit == first, online.stderr
    assert "no weights in safetensors" in later and "no weights in safetensors" in pickled
    assert "if you trust it, load model and tokenizer with transformers" in pickled
    for name, printed, reason in (
        ("me/mine@nowhere", nowhere, "it has no such branch, tag or commit"),
        ("me/none", none, "no model has this name, or it is private; if so, log in: hf auth login"),
        ("some/gated", gated, "its owner has to grant you access, on the model's page; then log in: hf auth login"),
        ("a/b/c", no_name, "names on the hub have the form owner/name"),
    ):
        assert printed == f"{name} is not a local directory, and cannot be loaded from the hub: {reason}"
    assert "a model of type llama, not a GPT-2" in llama
    assert not [path for path in hub.asked if path.endswith((".bin", "llama/resolve/main/model.safetensors"))]
    asked = len(hub.asked)
    names = ["me/mine@first", "me/other"]
    offline = client(hub, tmp_path, sys.executable, "-c", LOAD, *names, HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    cached, missing = offline.stdout.splitlines()
    assert cached == first
    assert missing.endswith("the hub does not answer, and the model is not in the cache; you can name a directory")
    assert len(hub.asked) == asked


def test_a_file_of_a_model_is_refused_with_its_directory(tmp_path, tiny_run, monkeypatch):
    path = tiny_run / "best" / "model.safetensors"
    with pytest.raises(UserError, match=f"{path} is a file: name its directory, {path.parent}$"):
        load_model(path)
    (tmp_path / "gpt2").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny_run / "best"))
    assert load_model("gpt2")  # the model on the hub, not the file


def test_a_model_on_the_hub_has_the_tokenizer_that_is_there_with_it(tmp_path, hub):
    """vocab.json and merges.txt alone, of as many ids as GPT-2 has."""
    a, b = map(of_kind("gpt2").vocabulary().get, "er")
    transformers_model(50257).save_pretrained(tmp_path / "model")
    save_vocab_and_merges(tmp_path / "model", of_kind("gpt2"), {"e": b, "r": a, "<|endoftext|>": 50256})
    hub.repositories["some/gpt2"] = {"4" * 40: contents(tmp_path / "model")}
    code = "from plaingpt.checkpoint import load_model; print(load_model('some/gpt2')[1].encode('e'))"
    found = client(hub, tmp_path, sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert found.stdout == f"{[{a: b, b: a}.get(i, i) for i in of_kind('gpt2').encode('e')]}\n", found.stderr
