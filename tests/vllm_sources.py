"""Python files of vLLM's releases, taken out of the wheels on the package index without downloading these: a wheel is a
zip archive, and the index gives parts of files.
"""

import io
import json
import os
import urllib.request
import zipfile
from collections.abc import Iterable
from email.message import Message
from http.client import HTTPException
from pathlib import Path

INDEX = "https://pypi.org/simple/vllm/"
CACHE = Path(__file__).resolve().parents[1] / "build" / "vllm-sources"


class Unreachable(RuntimeError):
    """No package index can be asked from here."""


def sources(version: str, files: Iterable[str]) -> Path:
    """The folder `vllm` of a release, with those of `files` in it that it has; kept for the next time.

    Raises Unreachable.
    """
    folder = CACHE / version
    wanted = {f"vllm/{name}" for name in files}
    listed = folder / "listed.json"
    if not listed.exists() or not wanted <= set(json.loads(listed.read_text())):
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(_Remote(_url(version))) as wheel:
            for name in wanted & set(wheel.namelist()):
                wheel.extract(name, folder)
        temporary = folder / f"listed.{os.getpid()}"
        temporary.write_text(json.dumps(sorted(wanted)))
        temporary.replace(listed)
    return folder / "vllm"


def _url(version: str) -> str:
    request = urllib.request.Request(INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    files = json.loads(_get(request)[0])["files"]
    wheels = [file["url"] for file in files if file["filename"].startswith(f"vllm-{version}-")]
    return str(next(url for url in wheels if "x86_64" in url))


def _get(request: urllib.request.Request) -> tuple[bytes, Message]:
    """The answer and its headers."""
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read(), answer.headers
    except (OSError, HTTPException) as error:
        raise Unreachable(f"{request.full_url}: {error}") from error


class _Remote(io.RawIOBase):
    """A file behind an address, read in parts of at least 256 KB."""

    def __init__(self, url: str) -> None:
        self._url, self._at, self._begin, self._part = url, 0, 0, b""
        self._size = int(_get(urllib.request.Request(url, method="HEAD"))[1]["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        if not self._begin <= self._at <= end <= self._begin + len(self._part):
            last = min(self._size, max(end, self._at + (256 << 10))) - 1
            request = urllib.request.Request(self._url, headers={"Range": f"bytes={self._at}-{last}"})
            self._begin, self._part = self._at, _get(request)[0]
        found = self._part[self._at - self._begin : end - self._begin]
        self._at = end
        return found
