# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The C sources of `native/` as a shared library: compiled by the system's compiler at first use, then kept in a cache.

A library fits one machine. Its file is named after a hash of the sources, the compiler's flags and everything that the
compiler predefines under them, which is its version and the instruction sets of this processor: two machines that share
a home directory do not share a file. The name also holds a hash of the contents, so that a damaged file is noticed, and
a file appears whole, by renaming, so that processes which compile at once do not meet.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

# A directory for compiled libraries, in place of optimum_ssm in the user's cache directory.
VARIABLE = "OPTIMUM_SSM_CACHE"
SOURCES = Path(__file__).parent / "native"
COMPILERS = ("cc", "gcc", "clang")
# Products are fused where the sources say so. Without errno and traps nothing changes in how NaN and inf are computed.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-pthread",
)
# How compilers call "whatever this processor has".
NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_SECONDS = 120


class BuildError(Exception):
    """There is no library; the message says why in one line."""


def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        BuildError: there is none.
    """
    found = _library()
    if isinstance(found, str):
        raise BuildError(found)
    return found


def library_obstacle() -> str | None:
    """Why there is no library, if there is none. The first call compiles, later ones in this process remember."""
    found = _library()
    return found if isinstance(found, str) else None


@cache
def _library() -> ctypes.CDLL | str:
    try:
        return build(SOURCES)
    except BuildError as error:
        return str(error)


def build(sources: Path) -> ctypes.CDLL:
    """The C files of a directory compiled and loaded, or loaded from the cache.

    Raises:
        BuildError: no compiler, one that fails, or a library that cannot be loaded.
    """
    compiler = _compiler()
    flags, target = _target(compiler)
    texts = [path.read_bytes() for path in sorted(sources.glob("*.[ch]"))]
    words = [word.encode() for word in (*compiler, *flags)]
    key = hashlib.sha256(b"\0".join([*texts, *words, target])).hexdigest()[:20]
    files = [str(path) for path in sorted(sources.glob("*.c"))]
    failure = None
    directories = _cache_directories()
    while True:
        try:
            directory = next(directories, None)
            if directory is None:
                break
            for path in directory.glob(f"kernels-{key}-*.so"):
                if path.stem.rpartition("-")[2] == _digest(path):
                    return _load(path)
                logger.warning_once(f"{path} is damaged: it is compiled again")
                path.unlink(missing_ok=True)
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                built = Path(scratch) / "library.so"
                _run([*compiler, *flags, *files, "-o", str(built)], "cannot compile the kernels")
                path = directory / f"kernels-{key}-{_digest(built)}.so"
                os.replace(built, path)
            loaded = _load(path)
            if failure is not None:
                logger.warning_once(
                    f"the compiled kernels are not kept, set {VARIABLE} to another directory: {failure}"
                )
            return loaded
        except (
            OSError,
            RuntimeError,
            BuildError,
        ) as error:  # not writable, full, or nothing may be executed there: the next one
            failure = error
    if isinstance(failure, BuildError):
        raise failure
    raise BuildError(f"the compiled library can be kept or loaded nowhere: {failure}")


def _load(path: Path) -> ctypes.CDLL:
    """A compiled library, which computes in torch's OpenMP threads; in a process that was forked it starts its own."""
    loaded = ctypes.CDLL(str(path))
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is not None and _in_openmp is not None:
        loaded.optimum_ssm_use_openmp(ctypes.cast(parallel, ctypes.c_void_p))
        _in_openmp.append(loaded)
    return loaded


# The libraries that compute in OpenMP; None in a process that was forked, to which none of its threads came.
_in_openmp: list[ctypes.CDLL] | None = []


def _after_fork() -> None:
    global _in_openmp
    for loaded in _in_openmp or ():
        loaded.optimum_ssm_use_openmp(None)
    _in_openmp = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _compiler() -> list[str]:
    named = os.environ.get("CC")
    for command in [shlex.split(named)] if named else [[name] for name in COMPILERS]:
        if command and shutil.which(command[0]):
            return [shutil.which(command[0]), *command[1:]]
    raise BuildError(f"CC is {named!r}, which is not found" if named else f"no C compiler ({', '.join(COMPILERS)})")


def _target(compiler: list[str]) -> tuple[list[str], bytes]:
    """The flags for this processor, and all macros that the compiler predefines under them."""
    for native in NATIVE_FLAGS:
        flags = [*FLAGS, *native]
        try:
            return flags, _run([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull], "the compiler does not work")
        except BuildError as error:
            failure = error
    raise failure


def _cache_directories() -> Iterator[Path]:
    """Where libraries are kept; a directory of this process alone comes last."""
    named = os.environ.get(VARIABLE)
    if named:
        yield Path(named).expanduser()
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        with suppress(RuntimeError):  # a user without a home, as in some containers
            home = home.expanduser()
        if home.is_absolute():
            yield home / "optimum_ssm"
    with tempfile.TemporaryDirectory(prefix="optimum_ssm-", ignore_cleanup_errors=True) as own:
        yield Path(own)  # a loaded library needs its file no more


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _run(command: list[str], failure: str) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{failure}: {error}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        wrong = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError(f"{failure}: {wrong}")
    return done.stdout
