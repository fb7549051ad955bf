"""Compiles every Triton kernel for GPUs that need not be there, with the assembler that comes with triton.

Run as a script, without the interpreter: `python tests/kernels/triton_targets.py`. It prints the registers of each
kernel, and fails where one spills them to memory or misses its device assertion.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bankwise.kernels.triton import decode_kernels, gate_kernels

# Of the 7B shape, with banks of 64 and 16 active.
ROUTER = {"logits_TF": "*fp32", "words_TN": "*i64", "threshold_TN": "*fp32", "width_TN": "*fp32"}
KERNELS = {
    gate_kernels.gate_forward_kernel: (
        ROUTER | {"h_TF": "*W", "gated_TF": "*W", "num_rows": "i32", "tau": "fp32"},
        {"B": 64, "K": 16, "BLOCK_B": 64, "BLOCK_M": 16},
    ),
    gate_kernels.gate_backward_kernel: (
        ROUTER
        | {"dy_TF": "*W", "h_TF": "*W", "dh_TF": "*W", "dz_TF": "*fp32", "num_rows": "i32", "alpha": "fp32"},
        {"B": 64, "BLOCK_B": 64, "BLOCK_M": 16, "WITH_DH": True, "WITH_DZ": True},
    ),
    decode_kernels.reduce_kernel: (
        {"x_TD": "*W", "reduce_RD": "*W", "code_TR": "*fp32", "D": "i32", "R": "i32", "x_stride": "i32",
         "reduce_stride": "i32"},
        {"BLOCK_R": 4, "BLOCK_D": 1024},
    ),
    decode_kernels.select_kernel: (
        {"code_TR": "*fp32", "expand_FR": "*W", "bias_F": "*W", "gate_offset_F": "*W", "up_offset_F": "*W",
         "gate_log_noise_F": "*W", "up_log_noise_F": "*W", "active_TA": "*i32", "bad_TN": "*i32",
         "R": "i32", "N": "i32", "expand_stride": "i32"},
        {"B": 64, "K": 16, "BLOCK_B": 64, "BLOCK_R": 64, "GATED": True, "KEEP_LOGITS": False},
    ),
    decode_kernels.activate_kernel: (
        {"x_TD": "*W", "packed_F3P": "*W", "active_TA": "*i32", "gate_bias_F": "*W",
         "h_TA": "*fp32", "A": "i32", "D": "i32", "x_stride": "i32", "P": "i32"},
        {"BLOCK_A": 4, "BLOCK_D": 1024, "GATE_BIAS": True, "UP_BIAS": False},
    ),
    decode_kernels.gather_kernel: (
        {"h_TA": "*fp32", "packed_F3P": "*W", "active_TA": "*i32", "parts_TSD": "*fp32", "A": "i32", "D": "i32",
         "P": "i32", "per_share": "i32", "S": "i32"},
        {"BLOCK_A": 16, "BLOCK_D": 256},
    ),
    decode_kernels.finish_kernel: (
        {"parts_TSD": "*fp32", "bad_TN": "*i32", "bias_D": "*W", "y_TD": "*W", "D": "i32", "N": "i32", "S": "i32"},
        {"BLOCK_N": 512, "BLOCK_S": 64, "BLOCK_D": 64, "BIAS": True},
    ),
}  # fmt: skip
ASSERTING = ("gate_forward_kernel", "finish_kernel")
SIZES = ("num_rows", "D", "R", "A", "N", "S")
ALIGNED = ("D", "P", "R", "x_stride", "reduce_stride", "expand_stride")


def check(kernel, arguments, constants, dtype: str, capability: int, *, ones: bool) -> str:
    names = kernel.arg_names
    # A launch passes None and the number 1 as constants.
    given = {name: kind for name, kind in arguments.items() if not (ones and name in SIZES)}
    constants = dict.fromkeys(names, None) | dict.fromkeys(SIZES, 1) | constants
    constants = {name: value for name, value in constants.items() if name in names and name not in given}
    signature = {name: given[name].replace("W", dtype) if name in given else "constexpr" for name in names}
    aligned = [name for name in given if signature[name].startswith("*") or name in ALIGNED]
    asserts = kernel.__name__ in ASSERTING
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"debug": asserts, "sanitize_overflow": False, "enable_fp_fusion": True},
    )
    assert ("__assertfail" in compiled.asm["ptx"]) == asserts, f"{kernel.__name__}: assertion"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    registers, local = (int(re.findall(rf"{word}:(\d+)", usage.stdout)[-1]) for word in ("REG", "LOCAL"))
    assert local == 0, f"{kernel.__name__} spills {local} bytes"
    shared = compiled.metadata.shared
    return f"sm_{capability} {dtype:5} {kernel.__name__:22} {registers:4} registers, {shared:6} bytes of shared memory"


def main() -> None:
    for capability, dtype, ones in ((90, "bf16", False), (80, "fp32", False), (80, "fp16", True)):
        for kernel, (arguments, constants) in KERNELS.items():
            print(check(kernel, arguments, constants, dtype, capability, ones=ones))


if __name__ == "__main__":
    main()
