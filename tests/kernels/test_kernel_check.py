"""The inner loops without torch (kernel_check.cpp): on this machine, and emulated on ARM where the tools are there."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from bankwise.kernels.cpu import build, library

ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def compile_check(folder: Path, compiler: str, *flags: str) -> Path:
    sources = Path(build.__file__).with_name("kernels.cpp"), Path(__file__).with_name("kernel_check.cpp")
    program = folder / "kernel_check"
    command = [compiler, *build._COMMON, "-Werror", "-ffp-contract=fast", f"-I{sources[0].parent}", *flags]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    return program


def check_agrees(*command: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-500:]
    assert finished.stdout.endswith(": 300 cases agree\n")


@pytest.mark.parametrize("isa", dict.fromkeys([library.available_isas()[0], "baseline"]))
def test_kernels_agree_with_plain_loops(isa, tmp_path):
    # Less optimised than the library: that one is under test elsewhere, and this compiles in a third of the time.
    flags = "-O1", f"-DBANKWISE_ISA={isa}", *build.instruction_sets()[isa]
    check_agrees(str(compile_check(tmp_path, build.compiler(), *flags)))


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is an ARM itself")
@pytest.mark.skipif(shutil.which(ARM_COMPILER) is None, reason=f"no ARM compiler ({ARM_COMPILER}) on the path")
@pytest.mark.skipif(shutil.which(ARM_EMULATOR) is None, reason=f"no ARM emulator ({ARM_EMULATOR}) on the path")
def test_kernels_agree_with_plain_loops_on_arm(tmp_path):
    program = compile_check(tmp_path, ARM_COMPILER, "-static", *build._OPTIMISED, "-DBANKWISE_ISA=baseline")
    check_agrees(ARM_EMULATOR, str(program))
