"""The console's style sheet, script and pictures, under addresses that change with the content."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final, NamedTuple

from aiohttp import web

PREFIX: Final = "/static"
FOREVER: Final = "public, max-age=31536000, immutable"
CONTENT_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class StaticFile(NamedTuple):
    """A file in memory."""

    content: bytes
    content_type: str
    digest: str


class StaticFiles:
    """The files of the package's folder `static`, which are read once."""

    def __init__(self) -> None:
        folder = files("fleet.server.console") / "static"
        self._files = {
            each.name: _file(each.name, each.read_bytes())
            for each in folder.iterdir()
            if each.name.rpartition(".")[2] in CONTENT_TYPES
        }

    def url(self, name: str) -> str:
        """Return the address of a file. Raises KeyError if there is none of this name."""
        return f"{PREFIX}/{self._files[name].digest}/{name}"

    def routes(self) -> list[web.RouteDef]:
        """Return the route of all files."""
        return [web.get(PREFIX + "/{digest}/{name}", self._serve)]

    async def _serve(self, request: web.Request) -> web.Response:
        file = self._files.get(request.match_info["name"])
        if file is None or request.match_info["digest"] != file.digest:
            raise web.HTTPNotFound
        return web.Response(
            body=file.content,
            content_type=file.content_type,
            charset="utf-8",
            headers={"Cache-Control": FOREVER},
        )


def _file(name: str, content: bytes) -> StaticFile:
    digest = hashlib.sha256(content).hexdigest()[:16]
    return StaticFile(content, CONTENT_TYPES[name.rpartition(".")[2]], digest)
