"""Compiles the C++ operators on first use, and loads them.

The library goes to `$BANKWISE_CACHE/kernels/<key>/`, where the key covers the sources, the flags, the compiler and the
version of torch, so that any change of these builds anew. It is written beside its place and renamed into it: processes
that build at the same time do the work twice, and none sees half a file.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from bankwise.cache import cache_folder
from bankwise.errors import KernelError

_HERE = Path(__file__).parent
_SOURCES = ("kernels.h", "kernels.cpp", "operators.cpp")
_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi")
_OPTIMISED = ("-O3", "-g0")
_SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
# Torch 2.10 is the first release whose stable ABI has parallel_for, and the oldest that bankwise supports.
_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Name and compiler flags of every copy of the inner loops for this machine's architecture, simplest first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"baseline": ()}
    return {
        "baseline": (),
        "avx2": ("-mavx2", "-mfma"),
        "avx512": _AVX512,
        "avx512_vnni": (*_AVX512, "-mavx512vnni"),
        "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    }


def compiler() -> str:
    """Path of the C++ compiler: `$CXX`, or the first of c++, g++, clang++ on the path."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise KernelError(
        f"no C++ compiler ({wanted or 'c++, g++ or clang++'}) was found; install one (for example `apt install g++`), "
        "or set CXX to its path"
    )


def library_path(*, sanitize: bool = False) -> Path:
    """The compiled library, built now if it is not in the cache."""
    program = compiler()
    flags = (*_COMMON, *(_SANITIZED if sanitize else _OPTIMISED))
    folder = cache_folder("kernels") / _key(program, flags)
    library = folder / "bankwise_cpu.so"
    if not library.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
                os.replace(_build(program, flags, Path(scratch)), library)
        except OSError as error:
            raise KernelError(
                f"the CPU kernels cannot be written to {folder} ({error.strerror}); set BANKWISE_CACHE to a folder "
                "that can be written"
            ) from error
    return library


def _key(program: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), version, *flags, _TARGET, str(instruction_sets())):
        digest.update(part.encode() + b"\0")
    for source in _SOURCES:
        digest.update((_HERE / source).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _build(program: str, flags: tuple[str, ...], scratch: Path) -> Path:
    jobs = [(["-DBANKWISE_ISA=" + name, *machine], "kernels.cpp", name) for name, machine in instruction_sets().items()]
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    jobs.append(([_TARGET, *includes], "operators.cpp", "operators"))

    def compile_one(job: tuple[list[str], str, str]) -> str:
        extra, source, name = job
        # Contraction to fused multiply-add is what makes the vector loops as fast as hand-written ones.
        command = [program, *flags, "-ffp-contract=fast", *extra, "-c", str(_HERE / source)]
        return _run([*command, "-o", str(scratch / f"{name}.o")], str(scratch / f"{name}.o"))

    with ThreadPoolExecutor(max_workers=max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = scratch / "library.so"
    torch_folder = cpp_extension.library_paths()[0]
    linked = [program, *flags, "-shared", *objects, f"-L{torch_folder}", "-ltorch_cpu", "-o", str(library)]
    _run(linked, str(library))
    return library


def _run(command: list[str], result: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        first = next((line for line in finished.stderr.splitlines() if "error" in line), finished.stderr[-300:])
        raise KernelError(f"the CPU kernels do not compile with {command[0]}: {first.strip()}")
    return result
