"""Checkpoints: what is written comes back bit for bit or is refused in one line, and what was there is there."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from starling.actors.replica.digest import digest_state
from starling.actors.replica.state_transfer import _unpack, export_state, load_state
from starling.algorithms.api import SERVER
from starling.orchestrator.checkpoints.filesystems import RemoteStorage, open_storage
from starling.orchestrator.checkpoints.manifest import checksum_of
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.errors import CheckpointError, CheckpointReadError, ConfigError, exit_code
from tests.checkpoint_states import LostAnswerError, ObjectStore, contents, export_of, is_of, packed, states
from tests.replica.test_state_transfer import donor, joiner

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.complex128, torch.float8_e5m2,
)  # fmt: skip


def store_at(folder: Path, **keys: Any) -> CheckpointStore:
    return CheckpointStore(None, folder, "r1", **keys)


def filled(folder: Path, *seeds: int, **keys: Any) -> CheckpointStore:
    """A store with the checkpoints of these rounds."""
    store = store_at(folder, **keys)
    for seed in seeds:
        store.write(seed, {"seed": seed}, states(seed))
    return store


def refused(store: CheckpointStore, **keys: Any) -> str:
    with pytest.raises(CheckpointReadError) as caught:
        store.read(**keys)
    message = str(caught.value)
    assert "\n" not in message
    assert exit_code(caught.value) == 2
    return message


# --- round trip -----------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    num_bytes = torch.empty(shape, dtype=dtype).nbytes
    data = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    return torch.tensor(list(data), dtype=torch.uint8).view(dtype).reshape(shape)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.recursive(
    SCALARS | tensors(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(
    trees=st.dictionaries(st.integers(SERVER, 1000), TREES, max_size=4),
    number=st.integers(0, 10_000_000),
    file_bytes=st.integers(1, 200),
    controller=st.dictionaries(st.text(max_size=4), st.lists(SCALARS, max_size=3), max_size=3),
)
def test_any_state_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, trees: Any, number: int, file_bytes: int, controller: Any
):
    folder = tmp_path_factory.mktemp("run")
    store = store_at(folder, file_bytes=file_bytes)
    exports = {node: packed(tree) for node, tree in trees.items()}
    nbytes = store.write(number, controller, iter(exports.items()))
    checkpoint = store.read()
    assert checkpoint.number == number
    assert checkpoint.controller == controller
    assert list(checkpoint.nodes) == list(exports)
    assert contents(checkpoint.nodes) == contents(exports)
    assert store.rounds() == [number]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert nbytes == sum(path.stat().st_size for path in files)
    # Others read the files too, and find the tensors where their types may begin.
    for path in files:
        if path.suffix == ".safetensors":
            safetensors.torch.load_file(path)
    for node, tree in trees.items():
        export = checkpoint.nodes[node]
        leaves = [
            torch.tensor(array, dtype=torch.uint8).view(getattr(torch, form["dtype"])).reshape(form["shape"])
            for form, array in zip(export.meta["tensors"], export.arrays, strict=True)
        ]
        assert packed(_unpack(export.meta["shared"], leaves, torch.device("cpu"))).meta == packed(tree).meta


def test_a_node_goes_on_from_a_checkpoint(tmp_path: Path):
    one, other = donor(), joiner()
    store = store_at(tmp_path)
    store.write(6, {}, [(0, export_state(one, everything=True))])
    load_state(other, store.read().nodes[0])
    assert torch.equal(other.parameters, one.parameters)
    assert digest_state(other.shared.committed()) == digest_state(one.shared.committed())
    assert digest_state(other.local.committed()) == digest_state(one.local.committed())
    assert other.committed_progress.position == one.committed_progress.position
    # What was loaded may be written to, and the checkpoint's arrays may not.
    with pytest.raises(ValueError, match="read-only"):
        store.read().nodes[0].arrays[0][0] = 1
    other.parameters.add_(1)


def test_what_is_not_a_number_comes_back(tmp_path: Path):
    store = store_at(tmp_path)
    store.write(0, {"loss": float("nan"), "best": float("-inf")}, [(0, export_of(torch.tensor([float("nan"), -0.0])))])
    checkpoint = store.read()
    assert str(checkpoint.controller) == "{'loss': nan, 'best': -inf}"
    assert checkpoint.nodes[0].arrays[0].tobytes() == torch.tensor([float("nan"), -0.0]).numpy().tobytes()


def test_equal_content_is_there_once(tmp_path: Path):
    model = torch.arange(10_000.0)
    alone = store_at(tmp_path / "a").write(0, {}, [(0, export_of(model))])
    together = store_at(tmp_path / "b").write(0, {}, [(node, export_of(model.clone())) for node in range(8)])
    assert alone < 41_500
    assert together < alone + 8 * 200
    nodes = store_at(tmp_path / "b").read().nodes
    assert all(nodes[node].arrays[0] is nodes[0].arrays[0] for node in nodes)
    # The same bytes of another type or shape are something else.
    store = store_at(tmp_path / "c")
    store.write(0, {}, [(0, export_of(model, model.view(100, 100), model.view(torch.int32)))])
    (file,) = (tmp_path / "c").rglob("*.safetensors")
    assert file.stat().st_size > 3 * 40_000


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([10] * 7, [30, 30, 10], id="several-nodes-in-a-file"),
        pytest.param([100, 10, 10], [100, 20], id="a-large-tensor-in-its-own"),
        pytest.param([30], [30], id="exactly-one"),
        pytest.param([], [], id="none"),
    ],
)
def test_files_are_neither_small_nor_many(tmp_path: Path, sizes: list[int], expected: list[int]):
    store = store_at(tmp_path, file_bytes=30)
    distinct = [torch.full((size,), index, dtype=torch.uint8) for index, size in enumerate(sizes)]
    store.write(3, {}, [(node, export_of(one)) for node, one in enumerate(distinct)])
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert [sum(one.numel() for one in safetensors.torch.load_file(file).values()) for file in files] == expected
    assert [file.name for file in files] == [f"tensors-{index:03}.safetensors" for index in range(len(expected))]


def test_states_are_consumed_one_by_one(tmp_path: Path):
    """What was written is not held: no more than about one file is referred to."""
    alive = 0
    most = 0

    def nodes() -> Any:
        nonlocal alive, most
        for node in range(20):
            tensor = torch.full((100,), node, dtype=torch.uint8)
            export = export_of(tensor)
            alive += 1
            most = max(most, alive)
            import weakref

            def gone() -> None:
                nonlocal alive
                alive -= 1

            weakref.finalize(export.arrays[0], gone)
            del tensor
            yield node, export
            del export

    store_at(tmp_path, file_bytes=300).write(0, {}, nodes())
    assert most <= 5


def test_a_node_is_there_once(tmp_path: Path):
    store = filled(tmp_path, 1)
    with pytest.raises(ValueError, match="node 3"):
        store.write(2, {}, [(3, export_of()), (3, export_of())])
    assert is_of(store.read(), 1)
    assert not (tmp_path / "checkpoints/round-000002").exists()


# --- which are there ------------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept(tmp_path: Path):
    store = filled(tmp_path, 1, 2, 5, 9, keep=2)
    assert store.rounds() == [5, 9]
    assert is_of(store.read(), 9)
    assert is_of(store.read(from_previous=True), 5)
    assert is_of(store.read(number=5), 5)
    assert (
        refused(store, number=4)
        == f"{tmp_path}/checkpoints: there is no checkpoint of round 4; there are rounds 5, 9, counted from 0"
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["round-000005", "round-000009"]


def test_what_was_not_written_to_its_end_is_none(tmp_path: Path):
    assert "no checkpoint" in refused(store_at(tmp_path))
    store = filled(tmp_path, 1, 2)
    (tmp_path / "checkpoints/round-000002/manifest.json").unlink()
    (tmp_path / "checkpoints/round-000007").mkdir()
    (tmp_path / "checkpoints/notes").mkdir()
    (tmp_path / "checkpoints/notes/mine.txt").write_text("x")
    assert store.rounds() == [1]
    assert is_of(store.read(), 1)
    assert "there is no checkpoint before that of round 1" in refused(store, from_previous=True)
    store.write(3, {"seed": 3}, states(3))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["notes", "round-000001", "round-000003"]


def test_a_round_written_again_replaces_that_at_once(tmp_path: Path):
    store = filled(tmp_path, 1, 2)
    for attempt in range(3):
        with pytest.raises(RuntimeError, match="gone"):
            store.write(2, {}, failing_after(1))
        assert is_of(store.read(), 2)
        nbytes = store.write(2, {"seed": 2}, states(2))
        assert is_of(store.read(), 2), attempt
        files = list((tmp_path / "checkpoints/round-000002").iterdir())
        assert nbytes == sum(path.stat().st_size for path in files)
        assert len(files) == 3


def failing_after(count: int) -> Any:
    yield from states(77)[:count]
    raise RuntimeError("a node is gone")


def test_the_future_that_was_left_is_forgotten(tmp_path: Path):
    filled(tmp_path, 1, 2, 3)
    store = store_at(tmp_path)
    assert is_of(store.read(from_previous=True), 2)
    store.write(5, {"seed": 5}, states(5))
    assert store.rounds() == [1, 2, 5]
    store.write(6, {"seed": 6}, states(6))
    assert store.rounds() == [2, 5, 6]
    # One that does not go on from a checkpoint forgets only what is ahead of it.
    store_at(tmp_path).write(5, {"seed": 5}, states(5))
    assert store.rounds() == [2, 5]


def test_what_a_source_raises_is_raised_and_nothing_is_left(tmp_path: Path):
    store = filled(tmp_path, 1, file_bytes=1)
    with pytest.raises(RuntimeError, match="a node is gone"):
        store.write(2, {}, failing_after(2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000001"]


# --- damage ---------------------------------------------------------------------------------------------------------

KINDS = ("manifest.json", "state.json", "tensors-000.safetensors", "tensors-001.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of two checkpoints of the same run."""
    folder = tmp_path_factory.mktemp("original")
    filled(folder, 11, 12, file_bytes=200)
    root = folder / "checkpoints"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, original: dict[str, bytes]) -> Any:
    """A store whose files are as given, for round 12."""
    root = tmp_path_factory.mktemp("damaged") / "checkpoints"
    assert sorted(original) == sorted(f"round-{number:06}/{kind}" for number in (11, 12) for kind in KINDS)

    there: dict[str, bytes | None] = {}

    def make(changes: dict[str, bytes | None]) -> CheckpointStore:
        for name, data in (original | changes).items():
            if name in there and there[name] == data:
                continue
            there[name] = data
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if data is None:
                (root / name).unlink(missing_ok=True)
            else:
                (root / name).write_bytes(data)
        return store_at(root.parent)

    return make


def check_refused(store: CheckpointStore, file: str) -> str:
    message = refused(store)
    assert f"round-000012/{file}: " in message
    assert message.endswith("; --from-previous uses round 11's")
    assert is_of(store.read(from_previous=True), 11)
    return message


def test_any_bit_that_flips_is_noticed(original: Any, damaged: Any):
    assert is_of(damaged({}).read(), 12)
    for start, kind in enumerate(KINDS):
        name = f"round-000012/{kind}"
        for offset in range(start, len(original[name]), 5):
            data = bytearray(original[name])
            data[offset] ^= 1 << offset % 8
            with pytest.raises(CheckpointReadError) as caught:
                damaged({name: bytes(data)}).read()
            assert f"round-000012/{kind}: " in str(caught.value)
            assert "\n" not in str(caught.value)
            assert str(caught.value).isprintable()
    check_refused(damaged({name: bytes(data)}), kind)


@settings(max_examples=80)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_files_cut_lengthened_and_swapped_are_refused(original: Any, damaged: Any, kind: str, data: st.DataObject):
    name = f"round-000012/{kind}"
    good = original[name]
    how = data.draw(st.sampled_from(("cut", "lengthened", "swapped", "gone", "other", "doubled", "stretch")))
    match how:
        case "cut":
            bad = good[: data.draw(st.integers(0, len(good) - 1))]
        case "lengthened":
            bad = good + data.draw(st.binary(min_size=1, max_size=9))
        case "swapped":
            bad = data.draw(st.sampled_from([one for other, one in original.items() if other != name and one != good]))
        case "gone":
            bad = None
        case "other":
            bad = data.draw(st.binary(max_size=2 * len(good)))
        case "doubled":
            bad = good + good
        case _:
            start = data.draw(st.integers(0, len(good) - 1))
            noise = data.draw(st.binary(min_size=1, max_size=20))
            bad = good[:start] + noise + good[start + len(noise) :]
            bad = bad if bad != good else good[1:]
    store = damaged({name: bad})
    if kind == "manifest.json" and bad is None:
        assert is_of(store.read(), 11)  # it is no checkpoint
        return
    check_refused(store, kind)


def resealed(manifest: bytes, **changes: Any) -> bytes:
    """A manifest with other content, and the checksum that belongs to it."""
    data = json.loads(manifest) | changes
    del data["checksum"]
    return json.dumps(data | {"checksum": checksum_of(json.dumps(data).encode())}, indent=2).encode() + b"\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 2}, "manifest.json: schema 2 is of a newer Starling; this one reads up to 1"),
        ({"schema_version": 2, "codec": "zstd"}, "manifest.json: schema 2 is of a newer Starling"),
        ({"schema_version": 0}, "manifest.json: is damaged"),
        ({"schema_version": True}, "manifest.json: is damaged"),
        ({"round": 11}, "manifest.json: is of round 11"),
        ({"files": {}}, "manifest.json: names no state.json"),
        ({"files": {"../../x": {"bytes": 1, "checksum": ""}}}, "manifest.json: is damaged"),
        ({"files": {"state.json": {"bytes": -1, "checksum": ""}}}, "manifest.json: is damaged"),
        (
            {"files": {"state.json": {"bytes": 10**15, "checksum": ""}}},
            "manifest.json: names 1000000000000000 bytes, more than",
        ),
        ({"files": []}, "manifest.json: is damaged"),
        ({"extra": 1}, "manifest.json: is damaged"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(original: Any, damaged: Any, changes: Any, said: str):
    name = "round-000012/manifest.json"
    store = damaged({name: resealed(original[name], **changes)})
    assert said in check_refused(store, said.partition(":")[0])


def test_a_checkpoint_of_another_run_is_refused_where_there_may_be_some_and_nothing_is_to_be_removed(tmp_path: Path):
    for number in (1, 2):
        CheckpointStore(str(tmp_path), tmp_path / "run", "r1").write(number, {}, states(number))
    (tmp_path / "r1").rename(tmp_path / "r2")
    with pytest.raises(CheckpointReadError, match=r"manifest.json: is of run r1, and not of r2$"):
        CheckpointStore(str(tmp_path), tmp_path / "run", "r2").read()
    shutil.copytree(tmp_path / "r2", tmp_path / "run/checkpoints")
    assert CheckpointStore(None, tmp_path / "run", "renamed").read().number == 2


@pytest.mark.parametrize(
    "state",
    [
        b"null",
        b"[]",
        b"{}",
        b'{"controller": {}, "nodes": {"x": {"tensors": []}}}',
        b'{"controller": {}, "nodes": {"0": {"tensors": [{"key": "none"}]}}}',
        b'{"controller": 3, "nodes": {}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_states_that_do_not_fit_are_refused(original: Any, damaged: Any, state: bytes):
    """Even where all checksums are right."""
    manifest = "round-000012/manifest.json"
    files = json.loads(original[manifest])["files"]
    files["state.json"] = {"bytes": len(state), "checksum": checksum_of(state)}
    store = damaged({manifest: resealed(original[manifest], files=files), "round-000012/state.json": state})
    assert "does not fit" in check_refused(store, "state.json")


def test_what_to_do_is_said(tmp_path: Path, original: Any, damaged: Any):
    store = damaged({f"round-{number:06}/state.json": b"" for number in (11, 12)})
    nbytes = len(original["round-000011/state.json"])
    assert refused(store, from_previous=True).endswith(
        f"round-000011/state.json: has 0 of {nbytes} bytes; there is no checkpoint before it"
    )
    assert refused(store, number=12).endswith("; there are also round 11")
    alone = filled(tmp_path, 3)
    (tmp_path / "checkpoints/round-000003/state.json").unlink()
    assert refused(alone) == (
        f"{tmp_path}/checkpoints/round-000003/state.json: is missing; there is no checkpoint before it"
    )
    assert refused(alone, number=3).endswith("there is no other checkpoint")


# --- storage trouble ------------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(num_bytes: int) -> Any:
    """A quota of the system, as a full disk would be: the write that exceeds it fails half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path):
    store = filled(tmp_path, 1)
    with no_file_larger_than(100_000), pytest.raises(CheckpointError) as caught:
        store.write(2, {}, [(0, export_of(torch.zeros(1000))), (1, export_of(torch.ones(100_000)))])
    assert str(caught.value) == f"checkpoint {tmp_path}/checkpoints/round-000002 cannot be written: File too large"
    assert exit_code(caught.value) == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000001"]
    assert is_of(store.read(), 1)


def test_no_place_for_a_folder(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"round-000002 cannot be written: Not a directory"):
        store_at(tmp_path).write(2, {}, states(2))


def written_to(objects: ObjectStore, *seeds: int) -> CheckpointStore:
    store = CheckpointStore(None, Path(), "r1", keep=2, storage=objects.storage(), file_bytes=200)
    for seed in seeds:
        store.write(seed, {"seed": seed}, states(seed))
    return store


def num_operations(number: int) -> int:
    """That it takes to write one more."""
    objects = ObjectStore()
    store = written_to(objects, 1, 2, 3)
    before = objects.operations
    store.write(number, {"seed": 4}, states(4))
    return objects.operations - before


@pytest.mark.parametrize("number", [4, 3], ids=["new", "again"])
@pytest.mark.parametrize("how", ["refused", "unheard", "dead"])
def test_whichever_operation_fails_one_checkpoint_is_whole(how: str, number: int):
    total = num_operations(number)
    assert total > 15
    said: list[str] = []
    for k in range(total):
        objects = ObjectStore()
        store = written_to(objects, 1, 2, 3)
        if how == "dead":
            objects.dead_from = objects.operations + k
        else:
            objects.failures = {objects.operations + k: how}
        try:
            store.write(number, {"seed": 4}, states(4))
        except CheckpointError as error:
            said.append(str(error))
            expected = 3
        else:
            expected = 4
        assert objects.operations > k
        objects.heal()
        # Another process finds either the new one or the old one, whole.
        found = written_to(objects).read()
        if expected == 3 and is_of(found, 4):
            assert how != "refused"  # it was written, and nobody could know
        else:
            assert is_of(found, expected), (k, objects.log)
        # And the next attempt is all that it takes to be rid of what was left.
        store.write(number, {"seed": 4}, states(4))
        assert is_of(written_to(objects).read(), 4)
        folders = {key.split("/")[3] for key in objects.objects}
        assert folders == {f"round-{one:06}" for one in ((3, 4) if number == 4 else (2, 3))}
        assert store.untidy is None
        assert len(objects.objects) == 8, sorted(objects.objects)
    assert len(said) > total // 3
    where = f"checkpoint mock://bucket/runs/r1/round-{number:06} cannot be written: When "
    assert all(one.startswith(where) and one.isprintable() for one in said)


def test_old_ones_that_cannot_be_removed_fail_nothing():
    objects = ObjectStore()
    store = written_to(objects, 1, 2)
    probe = len(objects.log)
    written_to(ObjectStore(log=objects.log), 3)
    sealed = max(place for place, what in enumerate(objects.log) if what.startswith("closing"))
    objects.dead_from = objects.operations + sealed - probe + 2  # the listing of what is there comes through
    store.write(3, {"seed": 3}, states(3))
    assert store.untidy is not None
    assert store.untidy.startswith("mock://bucket/runs/r1: old checkpoints cannot be removed: When ")
    objects.heal()
    assert is_of(store.read(), 3)


def test_a_store_that_cannot_be_read_says_so():
    objects = ObjectStore()
    written_to(objects, 1, 2)
    objects.failures = {objects.operations: "refused"}
    assert refused(written_to(objects)).startswith("mock://bucket/runs/r1 cannot be read: When listing")
    objects.failures = {objects.operations + 1: "unheard"}
    message = refused(written_to(objects))
    assert "round-000002/manifest.json: cannot be read: When reading" in message
    assert message.endswith("; --from-previous uses round 1's")
    assert issubclass(LostAnswerError, OSError)


def test_a_remote_file_system_with_folders(tmp_path: Path):
    """As HDFS has them: they are made first, and the manifest is moved into its place."""
    storage = RemoteStorage(LocalFileSystem(), str(tmp_path / "some/where"), "remote://", is_flat=False)
    store = CheckpointStore(None, Path(), "r1", keep=2, storage=storage, file_bytes=200)
    assert store.rounds() == []
    for seed in (1, 2, 3, 3, 3):
        store.write(seed, {"seed": seed}, states(seed))
        assert store.untidy is None
        assert is_of(store.read(), seed)
    assert store.rounds() == [2, 3]
    names = {path.name for path in (tmp_path / "some/where").rglob("*") if path.is_file()}
    assert not any("partial" in name for name in names)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 8
    (tmp_path / "some/where/round-000003/manifest.json").unlink()
    assert is_of(store.read(), 2)


# --- addresses ------------------------------------------------------------------------------------------------------


def test_addresses(tmp_path: Path):
    assert open_storage(None, tmp_path, "r1").shown == str(tmp_path)
    assert open_storage(str(tmp_path), Path("x"), "r1").shown == f"{tmp_path}/r1"
    assert open_storage(f"file://{tmp_path}", Path("x"), "r1").shown == f"{tmp_path}/r1"
    remote = open_storage("s3://AKIA:s%2Fcret@bucket/a/?scheme=http&endpoint_override=localhost:1", Path("x"), "r1")
    assert remote.shown == "s3://AKIA:***@bucket/a/r1"
    CheckpointStore(f"file://{tmp_path}/b", tmp_path, "r1").write(1, {}, states(1))
    assert (tmp_path / "b/r1/round-000001/manifest.json").exists()


@pytest.mark.parametrize(
    "uri", ["s3://AKIA:s%2Fcret@bucket/a?wrong=1", "nonsense://AKIA:s%2Fcret@x", "s3://AKIA:s%2Fcret@", "file://host/x"]
)
def test_addresses_that_are_none(uri: str):
    with pytest.raises(ConfigError) as caught:
        open_storage(uri, Path("x"), "r1")
    message = str(caught.value)
    assert message.startswith("checkpoint.uri: ")
    assert "cannot be used: " in message
    assert "cret" not in message
    assert "\n" not in message
