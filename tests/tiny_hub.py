"""A small Hub in this process, for the tests: creates repositories, takes commits, serves their files."""

import base64
import hashlib
import json
import re
import tempfile
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from huggingface_hub import constants
from transformers.utils import hub as transformers_hub


class TinyHub:
    """While open, `huggingface_hub` and transformers of this process talk to it, with an empty cache of their own.

    Attributes:
        tokens: every token that came with a request.
        private: repository -> whether it was created private.
        messages: commit messages, in order.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.repositories = defaultdict(lambda: defaultdict(dict))  # repository -> revision -> path -> bytes
        self.tokens, self.private, self.messages = set(), {}, []

    def files(self, repository, revision="main"):
        return dict(self.repositories[repository][revision])

    def __enter__(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.http.daemon_threads = True
        self.http.owner = self
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.cache = tempfile.TemporaryDirectory()
        self.patch = self.monkeypatch.context()
        patch = self.patch.__enter__()
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(transformers_hub, "_hf_api", None)  # made once, for the endpoint of that time
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", self.cache.name)
        return self

    def __exit__(self, *error):
        self.patch.__exit__(None, None, None)
        self.http.shutdown()
        self.http.server_close()
        self.cache.cleanup()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def hub(self):
        hub = self.server.owner
        if token := self.headers.get("authorization"):
            hub.tokens.add(token.removeprefix("Bearer "))
        return hub

    def answer(self, data, status=200, **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        hub, path = self.hub, unquote(self.path.split("?")[0])
        body = self.read()
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization'] or 'you'}/{asked['name']}"
            hub.private.setdefault(repository, asked.get("visibility") == "private")
            return self.answer({"url": f"{constants.ENDPOINT}/{repository}"})
        repository, action, revision = re.fullmatch(r"/api/models/(\S+/\S+?)/(preupload|commit)/(\S+)", path).groups()
        files = hub.repositories[repository][revision]
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "header":
                hub.messages.append(operation["value"]["summary"])
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        oid = _commit(files)
        return self.answer({"commitUrl": f"{constants.ENDPOINT}/{repository}/commit/{oid}", "commitOid": oid})

    def do_GET(self):
        hub, path = self.hub, unquote(self.path.split("?")[0])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(\S+))?", path):
            files = hub.repositories[found[1]][found[2] or "main"]
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": found[1], "modelId": found[1], "sha": _commit(files), "siblings": siblings})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            files = hub.repositories[found[1]][found[2]]
            entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files]
            return self.answer([entry for entry in entries if entry["path"].startswith(found[3])])
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found is None or found[1] not in hub.repositories:
            return self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        revisions = hub.repositories[found[1]]
        files = next((f for name, f in revisions.items() if found[2] in (name, _commit(f))), None)
        if files is None:
            return self.answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
        if found[3] not in files:
            return self.answer(
                {"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=_commit(files)
            )
        data = files[found[3]]
        return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=_commit(files))

    do_HEAD = do_GET

    def read(self):
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def _commit(files):
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest()
