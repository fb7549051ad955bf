"""The library is built once, whole, whoever asks for it and however many at once."""

import os
import subprocess
import sys

import pytest

from bankwise.errors import KernelError
from bankwise.kernels.cpu import build

SLOW_COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -z "$out" ] && echo "slow compiler 1.0" && exit 0
sleep 0.1
echo part > "$out"; sleep 0.1; echo whole >> "$out"
"""
ASK = "from bankwise.kernels.cpu.build import library_path; print(library_path().read_text().split())"


@pytest.fixture
def environment(tmp_path, monkeypatch):
    program = tmp_path / "slow-c++"
    program.write_text(SLOW_COMPILER)
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path / "cache"))
    return dict(os.environ)


def test_processes_that_build_at_once_see_whole_libraries(environment, tmp_path):
    command = [sys.executable, "-c", ASK]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["['part', 'whole']"] * 2
    (folder,) = (tmp_path / "cache" / "kernels").iterdir()
    assert [path.name for path in folder.iterdir()] == ["bankwise_cpu.so"]


def test_flags_and_compiler_are_part_of_the_place(environment, tmp_path, monkeypatch):
    plain = build.library_path()
    assert plain == build.library_path()
    assert plain != build.library_path(sanitize=True)
    program = tmp_path / "slow-c++"
    program.write_text(SLOW_COMPILER.replace("1.0", "2.0"))
    assert plain != build.library_path()


def test_errors_name_the_way_out(environment, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(KernelError, match="set BANKWISE_CACHE"):
        build.library_path()
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path / "other"))
    program = tmp_path / "slow-c++"
    program.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    with pytest.raises(KernelError, match=r"do not compile .* error: no such thing"):
        build.library_path()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match=r"no C\+\+ compiler \(no-such-compiler\) was found; install one"):
        build.library_path()
