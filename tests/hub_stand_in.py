"""A stand-in for the Hub on loopback: the part of its HTTP API that pushing and loading models needs.

Repositories are kept in memory. Every request is recorded, and faults can be planned.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN = "me", "hf_planted0token0that0must0not0be0written"
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".png")


@dataclass
class Request:
    """A request as the client sent it, without the `Authorization` header."""

    method: str
    path: str
    headers: str
    body: bytes
    status: int


@dataclass
class Repository:
    """One branch: the files and the message of each commit, the newest last."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, number: int = -1) -> str:
        number %= len(self.commits)
        return hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()

    def at(self, revision: str) -> dict[str, bytes] | None:
        shas = {self.sha(number): files for number, files in enumerate(self.commits)}
        return self.files if revision == "main" else shas.get(revision)


class HubStandIn(ThreadingHTTPServer):
    """
    Attributes:
        repositories: repositories by id.
        requests: all requests, in order.
        faults: number of times that requests are still to be answered with 503, by `(method, part of the path)`.
        lfs: whether large files go through LFS; otherwise all are sent within the commit.
        expired: whether the token is refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: dict[tuple[str, str], int] = {}
        self.lfs = True
        self.expired = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def asked(self, method: str, part: str) -> list[Request]:
        """The requests of a method whose path contains `part`."""
        return [request for request in self.requests if request.method == method and part in request.path]

    def is_to_fail(self, method: str, path: str) -> bool:
        with self.lock:
            for (fault_method, part), times in self.faults.items():
                if times and method == fault_method and part in path:
                    self.faults[fault_method, part] -= 1
                    return True
        return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def do(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.read_body()
        if self.server.is_to_fail(self.command, path):
            return self.answer({"error": "Service Unavailable"}, 503)
        token = self.headers.get("Authorization")
        if (token not in (None, f"Bearer {TOKEN}") or (token and self.server.expired)) and "/lfs/" not in path:
            return self.refuse("Invalid credentials in Authorization header")
        for methods, pattern, handle, for_writing in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                if for_writing and token is None:
                    return self.refuse("Invalid username or password.")
                return handle(self, *match.groups())
        return self.answer({"error": f"the stand-in does not know {self.command} {path}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        sent = "".join(f"{key}: {value}\n" for key, value in self.headers.items() if key.lower() != "authorization")
        self.server.requests.append(Request(self.command, self.path, sent, self.body, status))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, message: str) -> None:
        self.answer({"error": message}, 401, {"X-Error-Message": message})

    def not_found(self, code: str) -> None:
        self.answer({"error": code}, 404, {"X-Error-Code": code})

    def files_of(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files at a revision; `None` for an unknown revision, which is answered with an error."""
        if repo not in self.server.repositories:
            self.not_found("RepoNotFound")
            return None
        files = self.server.repositories[repo].at(revision)
        if files is None:
            self.not_found("RevisionNotFound")
        return files

    # ---- Answers --------------------------------------------------------------------------------------------------

    def who_am_i(self) -> None:
        self.answer({"type": "user", "name": USER, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo}", "name": repo}
        if repo in self.server.repositories:
            return self.answer({**answer, "error": "You already created this model repo"}, 409)
        self.server.repositories[repo] = Repository()
        return self.answer(answer)

    def validate_card(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = self.files_of(repo, revision)
        if files is None:
            return
        modes = []
        for file in json.loads(self.body)["files"]:
            large = self.server.lfs and file["path"].endswith(LFS_ENDINGS)
            known = files.get(file["path"])
            modes.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else blob_id(known, large),
                }
            )
        self.answer({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        objects = [
            {"oid": thing["oid"], "size": thing["size"]}
            | (
                {}
                if thing["oid"] in self.server.objects
                else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{thing['oid']}", "header": {}}}}
            )
            for thing in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def take_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer({"error": "these bytes have another hash"}, 400)
        self.server.objects[oid] = self.body
        return self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        files = self.files_of(repo, revision)
        if files is None:
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        repository, new, message = self.server.repositories[repo], dict(files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.server.objects:
                new[value["path"]] = self.server.objects[value["oid"]]
            else:
                return self.answer({"error": f"cannot commit {line['key']} {value}"}, 400)
        repository.commits.append(new)
        repository.messages.append(message)
        oid = repository.sha()
        return self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def info(self, repo: str, revision: str | None) -> None:
        files = self.files_of(repo, revision or "main")
        if files is not None:
            repository = self.server.repositories[repo]
            sha = repository.sha() if revision in (None, "main") else revision
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": repo, "modelId": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        files = self.files_of(repo, revision)
        if files is None:
            return None
        inside = {name: data for name, data in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            return self.not_found("EntryNotFound")
        return self.answer(
            [
                {"type": "file", "path": name, "size": len(data), "oid": blob_id(data, False)}
                for name, data in inside.items()
            ]
        )

    def resolve(self, repo: str, revision: str, name: str) -> None:
        files = self.files_of(repo, revision)
        if files is None:
            return None
        repository = self.server.repositories[repo]
        commit = {"X-Repo-Commit": repository.sha() if revision == "main" else revision}
        if name not in files:
            return self.answer({"error": name}, 404, {"X-Error-Code": "EntryNotFound", **commit})
        size = {"X-Linked-Size": str(len(files[name]))}
        return self.answer(files[name], 200, {"ETag": f'"{blob_id(files[name], False)}"', **size, **commit})


def blob_id(data: bytes, large: bool) -> str:
    """The id that git, or LFS for a large file, gives to these contents."""
    return hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.who_am_i, True),
    (("POST",), r"/api/repos/create", Handler.create, True),
    (("POST",), r"/api/validate-yaml", Handler.validate_card, False),
    (("POST",), rf"/api/models/{ID}/preupload/([^/]+)", Handler.preupload, True),
    (("POST",), rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch, True),
    (("PUT",), r"/lfs/(\w+)", Handler.take_object, False),
    (("POST",), rf"/api/models/{ID}/commit/([^/]+)", Handler.commit, True),
    (("GET",), rf"/api/models/{ID}(?:/revision/([^/]+))?", Handler.info, False),
    (("GET",), rf"/api/models/{ID}/tree/([^/]+)(?:/(.+))?", Handler.tree, False),
    (("GET", "HEAD"), rf"/{ID}/resolve/([^/]+)/(.+)", Handler.resolve, False),
]
