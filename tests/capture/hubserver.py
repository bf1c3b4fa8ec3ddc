"""A Hub on this machine for tests: what `huggingface_hub` asks of it to make, fill, list and read repositories.

Only the large-file protocol with plain HTTP is spoken, so clients are told HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

TOKEN = "hf_of_this_test"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits in order, each with all its files; a private one answers only who bears the token."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, Files] | None:
        """The commit that a revision names."""
        name = next(reversed(self.commits), None) if revision == "main" else revision
        return (name, self.commits[name]) if name in self.commits else None

    def commit(self, files: Files) -> str:
        """Add a commit and return its name."""
        name = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        return name


class Hub:
    """The server, in a thread of this process.

    Attributes
    ----------
    repositories : dict
    asked : list of str
        Method and path of each request, in order.
    stalls : str
        A file of this name is sent by half, and the rest never.
    exaggerates : str
        A file of this name is said to be of a pebibyte.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.stalls = self.exaggerates = ""
        self.blobs: Files = {}
        config = uvicorn.Config(_app(self), port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """Answer no more."""
        self._server.should_exit = True
        self._thread.join()

    def put(self, repository: str, directory: Path) -> str:
        """Commit the files of a directory."""
        files = {file.name: file.read_bytes() for file in directory.iterdir()}
        return self.repositories.setdefault(repository, Repository()).commit(files)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables of a process that uses this Hub and keeps what it downloads below `home`."""
        without = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        mine = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        return {**without, **mine, "HF_HUB_DISABLE_TELEMETRY": "1", **more}

    def fetched(self, name: str) -> list[str]:
        """Requests for a file's bytes."""
        return [one for one in self.asked if one.startswith("GET ") and one.endswith(f"/{name}")]


def _app(hub: Hub) -> FastAPI:
    app = FastAPI()
    _add_reading(app, hub)
    _add_writing(app, hub)

    @app.middleware("http")
    async def note(request: Request, call_next: Any) -> Response:
        hub.asked.append(f"{request.method} {request.url.path}")
        parts = request.url.path.removeprefix("/api/models").split("/")
        there = hub.repositories.get("/".join(parts[1:3]).removesuffix(".git"))
        writes = request.method in ("POST", "DELETE")  # who puts bytes shows by the address that it was told it
        if (writes or (there and there.private)) and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "Invalid credentials"}, 401)
        answer: Response = await call_next(request)
        return answer

    return app


def _add_reading(app: FastAPI, hub: Hub) -> None:
    def found(repository: str, revision: str) -> tuple[str, Files] | JSONResponse:
        one = hub.repositories.get(repository)
        there = one.at(revision) if one else None
        return there or _absent("RevisionNotFound" if one else "RepoNotFound")

    @app.get("/api/models/{org}/{name}")
    @app.get("/api/models/{org}/{name}/revision/{revision}")
    def info(org: str, name: str, revision: str = "main") -> Any:
        there = found(f"{org}/{name}", revision)
        if isinstance(there, JSONResponse):
            return there
        commit, files = there
        siblings = [{"rfilename": path, **_facts(hub, path, data)} for path, data in files.items()]
        return {"id": f"{org}/{name}", "sha": commit, "siblings": siblings, "tags": []}

    @app.get("/api/models/{org}/{name}/tree/{revision}")
    def tree(org: str, name: str, revision: str) -> Any:
        there = found(f"{org}/{name}", revision)
        if isinstance(there, JSONResponse):
            return there
        return [{"type": "file", "path": path, **_facts(hub, path, data)} for path, data in there[1].items()]

    @app.get("/api/models/{org}/{name}/tree/{revision}/{path:path}")
    def no_folders(org: str, name: str, revision: str, path: str) -> Any:
        return _absent("EntryNotFound")

    @app.api_route("/{org}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(request: Request, org: str, name: str, revision: str, path: str) -> Response:
        there = found(f"{org}/{name}", revision)
        if isinstance(there, JSONResponse):
            return there
        commit, files = there
        if path not in files:
            return _absent("EntryNotFound", commit)
        data, marks = files[path], {"X-Repo-Commit": commit, "ETag": f'"{_etag(path, files[path])}"'}
        if request.method == "HEAD":
            return Response(headers={**marks, "Content-Length": str(len(data))})
        if path == hub.stalls:
            return StreamingResponse(_by_half(hub, data), headers={**marks, "Content-Length": str(len(data))})
        return Response(data, headers=marks)


def _add_writing(app: FastAPI, hub: Hub) -> None:
    @app.post("/api/repos/create")
    async def create(request: Request) -> Any:
        asked = await request.json()
        name = f"{asked['organization']}/{asked['name']}"
        known = name in hub.repositories
        if not known:
            hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
            hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs"})  # as the real one begins
        answer = {"url": f"{hub.url}/{name}", "name": name}
        return JSONResponse({**answer, "error": "You already created this model repo"}, 409) if known else answer

    @app.post("/api/models/{org}/{name}/preupload/{revision}")
    async def preupload(request: Request) -> Any:
        paths = [one["path"] for one in (await request.json())["files"]]
        modes = {path: "lfs" if _is_large(path) else "regular" for path in paths}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    @app.post("/{org}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request) -> Any:
        asked = await request.json()
        return {"transfer": "basic", "objects": [_upload(hub, **one) for one in asked["objects"]]}

    @app.put("/blobs/{oid}")
    async def upload(request: Request, oid: str) -> Response:
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return Response(status_code=400)
        hub.blobs[oid] = data
        return Response()

    @app.post("/api/models/{org}/{name}/commit/{revision}")
    async def commit(request: Request, org: str, name: str) -> Any:
        repository = hub.repositories[f"{org}/{name}"]
        files = dict(before[1]) if (before := repository.at("main")) else {}
        for line in (await request.body()).splitlines():
            _apply(hub, files, **json.loads(line))
        oid = repository.commit(files)
        return {"commitUrl": f"{hub.url}/{org}/{name}/commit/{oid}", "commitOid": oid}


def _apply(hub: Hub, files: Files, *, key: str, value: dict[str, Any]) -> None:
    """Carry out one line of a commit."""
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        files[value["path"]] = hub.blobs[value["oid"]]
    elif key == "deletedFile":
        del files[value["path"]]
    else:
        assert key == "header", key


def _upload(hub: Hub, *, oid: str, size: int) -> dict[str, Any]:
    told: dict[str, Any] = {"oid": oid, "size": size}
    return told if oid in hub.blobs else {**told, "actions": {"upload": {"href": f"{hub.url}/blobs/{oid}"}}}


def _by_half(hub: Hub, data: bytes) -> Iterator[bytes]:
    yield data[: len(data) // 2]
    while hub.stalls:
        time.sleep(0.01)


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_large(path) else hashlib.sha1(data).hexdigest()


def _facts(hub: Hub, path: str, data: bytes) -> dict[str, Any]:
    size = 1 << 50 if path == hub.exaggerates else len(data)
    etag = _etag(path, data)
    large = {"lfs": {"oid": etag, "sha256": etag, "size": size, "pointerSize": 130}} if _is_large(path) else {}
    blob = hashlib.sha1(data).hexdigest()
    return {"size": size, "oid": blob, "blobId": blob, **large}


def _absent(code: str, commit: str | None = None) -> JSONResponse:
    said = {"X-Error-Code": code, "X-Error-Message": "not here", **({"X-Repo-Commit": commit} if commit else {})}
    return JSONResponse({"error": "not here"}, 404, headers=said)
