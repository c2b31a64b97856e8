# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How the C files become a library: the cache, several processes, and machines without a compiler."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from optimum_ssm.ops import native_library
from optimum_ssm.ops.native_library import BuildError, build


@pytest.fixture(autouse=True)
def cache(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv(native_library.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(code, **environment):
    """Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"OPTIMUM_SSM_SCAN": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What it printed, and its warnings or errors."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


def libraries(directory):
    return sorted(directory.glob("*"))


def test_it_is_compiled_once_and_kept(cache):
    build(native_library.SOURCES)
    (path,) = libraries(cache)
    made = path.stat().st_mtime_ns
    build(native_library.SOURCES)
    assert libraries(cache) == [path] and path.stat().st_mtime_ns == made


def test_importing_compiles_nothing(cache):
    finish(start("import optimum_ssm.pruner, optimum_ssm.ops.selective_scan, optimum_ssm.ops.causal_convolution"))
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"no library", None])
def test_a_damaged_file_is_compiled_again(cache, content):
    build(native_library.SOURCES)
    (path,) = libraries(cache)
    whole = path.read_bytes()
    path.unlink()  # not written over: it is mapped by this process
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert build(native_library.SOURCES).optimum_ssm_selective_scan
    (path,) = libraries(cache)
    assert native_library._digest(path) in path.name


def test_processes_that_compile_at_once_do_not_meet(cache):
    code = """
        from optimum_ssm.ops.native_library import library
        print(library().optimum_ssm_selective_scan is not None)
    """
    processes = [start(code) for _ in range(2)]
    assert [finish(process)[0] for process in processes] == ["True\n", "True\n"]
    assert libraries(cache) and all(path.suffix == ".so" for path in libraries(cache))


def test_without_a_compiler_the_scan_runs_in_torch(tmp_path):
    code = """
        import torch
        from optimum_ssm.errors import ConfigurationError
        from optimum_ssm.ops.selective_scan import selective_scan
        maps = torch.ones(1, 1, 5)
        inputs = torch.ones(1, 3, 5), torch.ones(1, 3, 5), -torch.ones(3, 1), maps, maps
        expected = selective_scan(*inputs, backend="torch")
        assert all(torch.equal(selective_scan(*inputs), expected) for _ in range(2))
        try:
            selective_scan(*inputs, backend="native")
        except ConfigurationError as error:
            print(error)
    """
    output, errors = finish(start(code, PATH=str(tmp_path), CC=""))
    assert output == "the native scan cannot run: no C compiler (cc, gcc, clang)\n"
    assert errors.count("The scan runs in torch, several times slower than compiled: no C compiler") == 1


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: fatal error: no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match="^the compiler does not work: cc: fatal error: no space left$"):
        build(native_library.SOURCES)


def test_cc_decides(monkeypatch, cache):
    monkeypatch.setenv("CC", "nocc -m64")
    with pytest.raises(BuildError, match="^CC is 'nocc -m64', which is not found$"):
        build(native_library.SOURCES)
    found = next(path for name in native_library.COMPILERS if (path := shutil.which(name)))
    monkeypatch.setenv("CC", f"{found} -DANYTHING")
    build(native_library.SOURCES)
    assert len(libraries(cache)) == 1


def test_a_cache_that_cannot_be_written_is_done_without(cache):
    cache.write_text("a file in the way")
    assert build(native_library.SOURCES).optimum_ssm_selective_scan
    assert cache.read_text() == "a file in the way"


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv(native_library.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build(native_library.SOURCES)
    assert len(libraries(tmp_path / "xdg" / "optimum_ssm")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    build(native_library.SOURCES)
    assert len(libraries(tmp_path / "home" / ".cache" / "optimum_ssm")) == 1


def test_the_file_is_named_after_what_is_compiled_and_for_what(monkeypatch, tmp_path, cache):
    """Another source and another processor each have a file of their own."""
    shutil.copytree(native_library.SOURCES, tmp_path / "sources")
    build(tmp_path / "sources")
    build(native_library.SOURCES)
    assert len(libraries(cache)) == 1  # the same text at another place
    with (tmp_path / "sources" / "vectors.h").open("a") as header:
        header.write("/* changed */\n")
    build(tmp_path / "sources")
    assert len(libraries(cache)) == 2
    monkeypatch.setattr(native_library, "NATIVE_FLAGS", ((),))  # the processor that the compiler takes by itself
    build(tmp_path / "sources")
    assert len(libraries(cache)) == 3


def test_a_source_that_does_not_compile_says_so(tmp_path, cache):
    (tmp_path / "wrong.c").write_text("int f(void) { return nothing; }\n")
    with pytest.raises(BuildError, match="cannot compile the kernels: .*error"):
        build(tmp_path)
    assert not libraries(cache)


@pytest.mark.parametrize("before", ["scan()", "inputs[0].exp()"])
def test_a_forked_process_scans_with_several_threads(before):
    """After its parent used threads of OpenMP, in our kernels or in torch alone: the child does not have them."""
    code = f"""
        import os, torch
        from optimum_ssm.ops.selective_scan import selective_scan
        torch.set_num_threads(4)
        ones = torch.ones(1, 16, 600)
        inputs = torch.ones(1, 400, 600), torch.ones(1, 400, 600), -torch.ones(400, 16), ones, ones

        def scan():
            return selective_scan(*inputs, backend="native").numpy().tobytes()

        {before}
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, scan()[:4000])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(os.read(reading, 4000) == scan()[:4000])
    """
    assert finish(start(code))[0] == "True\n"


def test_a_full_cache_is_done_without(monkeypatch, cache, tmp_path):
    """The linker fails there; the next directory will do."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    wrapper = tmp_path / "cc"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *{cache}*) echo "error: No space left on device" >&2; exit 1;; esac\nexec {compiler} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    assert build(native_library.SOURCES).optimum_ssm_selective_scan
    assert not list(cache.glob("*.so"))


def test_a_user_without_a_home_compiles_elsewhere(monkeypatch):
    for name in (native_library.VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert build(native_library.SOURCES).optimum_ssm_selective_scan
