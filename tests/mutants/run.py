# ruff: noqa: T201 - it is a program
"""Run the tests on mutants of the code: which plausible mistakes do they notice?

``python -m tests.mutants.run [--only WORD …] [--every N] [--survivors FILE]`` copies the tree, and forks a process for
each mutant, one at a time: the imports of torch and its like are paid for once, and our own packages are imported by
the fork, with the mistake in them. Tests are run first without a mutant: where they fail, their mutants say nothing.
On mutants the shortest tests are run first, as one that fails ends the trial; Hypothesis looks for no shorter example.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.mutants.catalog import Mutant, load_mutants
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

COPIED = ("src", "algorithms", "actors", "orchestrator", "tune_spaces", "tests", "examples", "docs", "benchmarks")
OURS = ("starling", "tests")
"""What is imported from the copy."""
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "cluster.yaml", "Makefile", "mkdocs.yml", "constraints.txt")
USED = (
    "starling.actors.host.host",
    "starling.actors.host.batched",
    "starling.orchestrator.cli.main",
    "starling.orchestrator.runtimes.simulator.runtime",
    "starling.orchestrator.jobs",
)
"""Of our own: what they import of others' is loaded beforehand."""
PRELOADED = ("torch", "torch.func", "torch._dynamo", "scipy", "networkx", "pyarrow.dataset", "hypothesis", "pytest")
LEAST_LIMIT_S, LIMIT_FACTOR = 60.0, 6.0
"""A mutant may take this many times as long as its tests did without it: the machine may be busier by then."""
BASELINE_LIMIT_S = 600.0
PASSED, FAILED, NONE_SELECTED = 0, 1, 5
TIMED_OUT = -1
_SHOWN_LINES = 15
"""Of what pytest said, where it fails without a mutant."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen mutants and print what became of each; return 1 if one survived, 2 if one could not be tried."""
    parser = argparse.ArgumentParser(description="run the tests on mutants of the code")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="mutants whose area or file has a word")
    parser.add_argument("--survivors", type=Path, help="a file for the list of those that no test noticed")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of those each N-th, for a quick estimate")
    options = parser.parse_args(arguments)
    words: list[str] = options.only
    chosen = [one for one in load_mutants() if not words or any(word in f"{one.area} {one}" for word in words)]
    chosen = chosen[:: max(1, options.every)]
    if not chosen:
        parser.error(f"no mutant's area, file or description has one of: {' '.join(words)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the copy of the tree is removed
    _preload()
    os.environ.update(PYTHONHASHSEED="0")
    with tempfile.TemporaryDirectory(prefix="starling-mutants-") as name:
        # Trials end without atexit: each would leave the folder of its tests' key behind.
        os.environ["STARLING_STATE_DIR"] = str(Path(name, "state"))
        outcomes = Trials(_copied(Path(name).resolve())).run(chosen)
    return _report(outcomes, options.survivors)


class Trials:
    """Runs of the tests on a copy of the tree."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self._limits: dict[tuple[tuple[str, ...], str], float] = {}

    def run(self, mutants: Sequence[Mutant]) -> list[tuple[Mutant, str]]:
        """Try each mutant; return it with ``killed``, ``survived`` or what kept it from being tried."""
        outcomes: list[tuple[Mutant, str]] = []
        for number, mutant in enumerate(mutants, start=1):
            began = time.monotonic()
            outcome = self.outcome(mutant)
            outcomes.append((mutant, outcome))
            print(f"[{number}/{len(mutants)}] {outcome:8} {time.monotonic() - began:5.0f} s  {mutant}", flush=True)
        return outcomes

    def outcome(self, mutant: Mutant) -> str:
        """Try one."""
        path = self.tree / mutant.file
        original = path.read_text(encoding="utf-8")
        try:
            changed = mutant.apply(original)
            compile(changed, mutant.file, "exec")
        except (ValueError, SyntaxError) as error:
            return f"error: {error}"
        # The file itself for the examples in its docstrings; behind its tests, or it would be imported twice.
        examples = (f"src/starling/{mutant.file}",) if ">>>" in original and not mutant.keyword else ()
        runs = [(mutant.tests, mutant.keyword), *([(examples, "")] if examples else [])]
        limits = [self._limit_s(what, keyword) for what, keyword in runs]
        if not all(limits):
            return f"error: its tests do not pass without it: {' '.join(mutant.tests)} {mutant.keyword}".rstrip()
        written = path.stat()
        path.write_text(changed, encoding="utf-8")
        try:
            code = self._tested((*mutant.tests, *examples), mutant.keyword, sum(limits))
        finally:
            path.write_text(original, encoding="utf-8")
            os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))  # what was compiled of it is right again
        if code in {PASSED, NONE_SELECTED}:
            return "survived"
        return "killed" if code != TIMED_OUT else "killed (too slow)"

    def _limit_s(self, what: tuple[str, ...], keyword: str) -> float:
        """How long ``what`` may take with a mutant; 0 if it does not pass without."""
        if (what, keyword) not in self._limits:
            began = time.monotonic()
            code = self._tested(what, keyword, BASELINE_LIMIT_S, unchanged=True)
            limit = max(LEAST_LIMIT_S, LIMIT_FACTOR * (time.monotonic() - began))
            self._limits[what, keyword] = limit if code == PASSED else 0.0
            if code != PASSED:
                print("\n".join((self.tree / "log.txt").read_text(errors="replace").splitlines()[-_SHOWN_LINES:]))
        return self._limits[what, keyword]

    def _tested(self, what: Sequence[str], keyword: str, limit_s: float, *, unchanged: bool = False) -> int:
        """pytest's exit code, or ``TIMED_OUT``; -signal, as of a subprocess, if it crashed."""
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            code = FAILED
            try:
                # Of a mutant nothing is kept: compiled files are told by time and size, and it may have another's.
                sys.dont_write_bytecode = not unchanged
                os.environ.update({} if unchanged else {"PYTHONDONTWRITEBYTECODE": "1"})
                code = _child(self.tree, what, keyword, measures=unchanged)
            except BaseException:  # noqa: BLE001 - of a fork nothing may get out
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        until = time.monotonic() + limit_s
        try:
            while time.monotonic() < until:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
        finally:
            _end_group(pid)  # also what a test left behind, and when this run is interrupted
        os.waitpid(pid, 0)
        return TIMED_OUT


class ShortestFirst:
    """A plugin of pytest: measures how long tests take, or runs them in the order of what was measured."""

    def __init__(self, path: Path, *, measures: bool) -> None:
        self._path, self._measures = path, measures
        self._seconds: Counter[str] = Counter(json.loads(path.read_text()) if path.exists() else {})

    def pytest_collection(self) -> None:
        """Before the tests' modules are imported, and behind conftest.py: have Hypothesis stop at what fails."""
        from hypothesis import Phase, settings

        settings.register_profile("mutants", settings.default, phases=(Phase.explicit, Phase.generate))
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Sort the tests; those that were not measured come first."""
        if not self._measures:
            items.sort(key=lambda item: self._seconds[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add what a test, its setup or its teardown took."""
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Write down what was measured."""
        if self._measures:
            self._path.write_text(json.dumps(self._seconds))


def _child(tree: Path, what: Sequence[str], keyword: str, *, measures: bool) -> int:
    """Run pytest in this process, a fork, on the tree."""
    os.setsid()
    log = os.open(tree / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    here = (tree / "src", tree)
    elsewhere = [one for one in sys.path if one and Path(one).resolve() not in (ROOT, ROOT / "src")]
    sys.path[:] = [*map(str, here), *elsewhere]
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, here))
    pytest = importlib.import_module("pytest")
    chosen = ["-k", keyword] if keyword else []
    # Imported before pytest could rewrite their asserts, of which we want nothing.
    options = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:xdist", "-p", "no:cacheprovider"]
    options += ["-x", "-q", "-m", "not cluster and not long and not soak", "--doctest-modules", *chosen]
    code = int(pytest.main([*options, *what], plugins=[ShortestFirst(tree / "seconds.json", measures=measures)]))
    sys.stdout.flush()
    return code


def _end_group(pid: int) -> None:
    """Kill a fork and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _preload() -> None:
    """Import what our packages import of others', and nothing of ours."""
    for name in PRELOADED:
        importlib.import_module(name)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            for name in USED:
                importlib.import_module(name)
            os.write(writer, "\n".join(name for name in sys.modules if name.split(".")[0] not in OURS).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as names:
        others = names.read().split()
    os.waitpid(pid, 0)
    for name in others:
        with contextlib.suppress(Exception):  # some are made as others are imported, and cannot be by themselves
            importlib.import_module(name)
    gc.freeze()  # pytest collects garbage in each fork, and would go through all of that


def _copied(tree: Path) -> Path:
    """Copy what tests need."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    return tree


def _report(outcomes: Sequence[tuple[Mutant, str]], survivors: Path | None) -> int:
    """Print the table by area and the survivors; return the exit code."""
    kinds = ("killed", "survived", "error")
    table: dict[str, Counter[str]] = {}
    for mutant, outcome in outcomes:
        table.setdefault(mutant.area, Counter())[outcome.split(":")[0].split(" ")[0]] += 1
    print(f"\n{'area':20}" + "".join(f"{kind:>10}" for kind in kinds))
    for area, counts in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"{area:20}" + "".join(f"{counts[kind]:10}" for kind in kinds))
    lived = [mutant for mutant, outcome in outcomes if outcome == "survived"]
    untried = [outcome for _, outcome in outcomes if outcome.startswith("error")]
    lines = [f"{mutant}\n    {' '.join(mutant.tests)} {mutant.keyword}".rstrip() for mutant in lived]
    print("\n".join(["", f"{len(lived)} survived:", *lines] if lived else ["", "none survived"]))
    print("\n".join(untried))
    if survivors is not None:
        survivors.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return 2 if untried else 1 if lived else 0


if __name__ == "__main__":
    sys.exit(main())
