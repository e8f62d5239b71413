"""Files: patterns, folders, and a store that speaks S3's protocol."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actors.data import files
from actors.tasks.parquet import Parquet
from actors.tasks.text_lm import TextLM
from algorithms.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("/a/*.txt", ["/a/b.txt", "/a/.txt"], ["/a/b/c.txt", "/a/b.txt.gz", "/a/btxt"]),
        ("/a/**/*.txt", ["/a/b.txt", "/a/b/c.txt", "/a/b/c/d.txt"], ["/b/a.txt"]),
        ("/a/**", ["/a/b", "/a/b/c"], ["/ab"]),
        ("/a/?.[ch]", ["/a/x.c", "/a/x.h"], ["/a/xy.c", "/a/x.o", "/a//.c"]),
        ("/a/[!x].c", ["/a/y.c"], ["/a/x.c"]),
        ("/a+b/*.c", ["/a+b/y.c"], ["/aab/y.c"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]):
    matches = re.compile(files._translated(pattern)).fullmatch
    assert all(matches(path) for path in yes)
    assert not any(matches(path) for path in no)


def test_a_folder_is_listed_in_the_order_of_its_paths(tmp_path: Path):
    for name in ("b.txt", "a/z.txt", "a/.hidden.txt", ".git/x.txt", "a/__pycache__/y.txt", "c.TXT", "d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    listing = files.find("key", str(tmp_path), {".txt"})
    assert [listing.relative(path) for path in listing.files] == ["a/z.txt", "b.txt", "c.TXT"]
    assert listing.sizes == (7, 5, 5)
    (tmp_path / "e[1].txt").write_text("a path that is there is no pattern")
    assert len(files.find("key", str(tmp_path / "e[1].txt")).files) == 1
    (only,) = files.find("key", str(tmp_path / "d.png")).files
    assert only == str(tmp_path / "d.png")
    with pytest.raises(DataError, match=r"key: .* has no .csv files"):
        files.find("key", str(tmp_path), {".csv"})


def test_control_characters_are_not_shown():
    assert files.printable("a\x0f\nb é") == "a??b é"


# --- a store ----------------------------------------------------------------------------------------------------------


class _Store(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading takes: HEAD, GET with a range, and the list of a prefix."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    read: list[tuple[str, str | None]]

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def key(self) -> str:
        return urlsplit(self.path).path.removeprefix("/bucket").lstrip("/")

    def do_HEAD(self) -> None:
        data = self.objects.get(self.key())
        if data is None:
            return self.answer(404)
        return self.answer(
            200, Content_Length=str(len(data)), ETag='"1"', Last_Modified="Wed, 25 Nov 2026 00:00:00 GMT"
        )

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if "list-type" in query:
            found = sorted(key for key in self.objects if key.startswith(query.get("prefix", "")))
            entries = "".join(
                f"<Contents><Key>{key}</Key><Size>{len(self.objects[key])}</Size>"
                "<LastModified>2026-11-25T00:00:00.000Z</LastModified></Contents>"
                for key in found
            )
            head = f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>"
            body = f'<?xml version="1.0"?><ListBucketResult>{head}{entries}</ListBucketResult>'
            return self.answer(200, body.encode(), Content_Type="application/xml")
        data = self.objects.get(self.key())
        if data is None:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        asked = self.headers.get("Range")
        self.read.append((self.key(), asked))
        if asked is None:
            return self.answer(200, data, ETag='"1"')
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        piece = data[first : last + 1]
        return self.answer(206, piece, Content_Range=f"bytes {first}-{first + len(piece) - 1}/{len(data)}", ETag='"1"')

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Store]]:
    class Here(_Store):
        objects: dict[str, bytes] = {}
        read: list[tuple[str, str | None]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    Here.query = f"?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield Here
    server.shutdown()
    server.server_close()
    thread.join(10)


def parquet_bytes(start: int, stop: int) -> bytes:
    sink = pa.BufferOutputStream()
    number = np.arange(start, stop)
    pq.write_table(pa.table({"a": number.astype("float32"), "y": number % 3}), sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


def test_parquet_in_a_store(store: type[_Store]):
    store.objects |= {
        f"data/part-{number}.parquet": parquet_bytes(200 * number, 200 * number + 200) for number in range(2)
    }
    store.objects["data/notes.txt"] = b"not to be read"
    for path in ("data", "data/part-*.parquet"):
        task = Parquet(path=f"s3://bucket/{path}{store.query}", label="y")  # type: ignore[attr-defined]
        train = task.train_samples(2)
        assert (len(train), len(task.validation_samples(2))) == (360, 40)
        features, labels = train.batch(torch.tensor([0, 200, 359]))
        assert features[:, 0].tolist() == [0.0, 220.0, 379.0]
        assert labels.tolist() == [0, 1, 1]
    assert {key for key, _ in store.read} == {"data/part-0.parquet", "data/part-1.parquet"}
    # Footers and row groups, and never a file as a whole.
    assert all(asked is not None for _, asked in store.read)
    with pytest.raises(DataError, match=r"task.path: s3://bucket/nowhere.* does not exist here"):
        Parquet(path=f"s3://bucket/nowhere{store.query}", label="y").train_samples(1)  # type: ignore[attr-defined]


def test_texts_in_a_store(store: type[_Store]):
    store.objects |= {f"texts/{number}.txt": bytes([ord("a") + number]) * 40 for number in range(3)}
    task = TextLM(corpus=f"s3://bucket/texts{store.query}", context=7, max_bytes=100)  # type: ignore[attr-defined]
    (windows,) = task.train_samples(1).batch(torch.arange(11))
    assert bytes(windows.flatten().tolist()) == b"a" * 40 + b"b" * 40 + b"c" * 8
