"""Compiles every Triton kernel for GPUs that need not be there, with the assembler that comes with triton.

Run in `tests`, without the interpreter: `python -m kernels.triton_targets`. The launching code runs as it would
on the GPU, up to the launch itself. It prints the registers of each kernel, and fails where one spills them to memory
or misses its device assertion.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from kernels.kernel_cases import Case, make_input, make_layer
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bankwise.kernels.cpu.packing import pack
from bankwise.kernels.triton import decode, gate

CASES = {
    "7b": {"hidden": 3584, "banks": 4, "rank": 512},
    "ones": {"hidden": 1, "banks": 1, "rank": 2, "bank_size": 1, "active": 1, "form": "linear", "bias": True},
}
"""Widths of the 7B shape, and sizes of 1, which a launch passes as constants."""

ASSERTING = ("gate_forward_kernel", "finish_kernel")


class AbsentGpu:
    """What the compiler asks of the driver."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class CompileOnly:
    """While active, a launch compiles its kernel and checks the result."""

    def __enter__(self):
        self.run = JITFunction.run
        JITFunction.run = lambda kernel, *arguments, **settings: report(
            kernel.__name__, self.run(kernel, *arguments, **settings | {"warmup": True})
        )

    def __exit__(self, *_):
        JITFunction.run = self.run


def report(name, compiled):
    asserts = "__assertfail" in compiled.asm["ptx"]
    assert asserts == (name in ASSERTING), f"{name}: device assertion"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, local = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "LOCAL"))
    assert local == 0, f"{name} spills {local} bytes"
    print(f"  {name:22} {registers:4} registers, {compiled.metadata.shared:6} bytes of shared memory")


@torch.no_grad()
def launch_all(case):
    layer, x = make_layer(case), make_input(case)
    packed = pack(layer, kernel="triton")
    size, active = case.bank_size, case.active
    active_TA, bad_TN, _ = decode.select_channels(x, decode.Predictor.of(layer.predictor), size, active)
    bias = (linear.bias for linear in (layer.gate_proj, layer.up_proj, layer.down_proj))
    decode.run_channels(x, packed.weights_F3P, active_TA, bad_TN, *bias)
    h, logits = torch.zeros(16, size, dtype=case.dtype), torch.zeros(16, size)
    _, *saved = gate.unit_gate(h, logits, size, active, 1.0)
    gate.unit_gate_backward(h, h, logits, *saved, size, 1.0, True, active < size)


def main():
    for capability, dtype, name in ((90, "bfloat16", "7b"), (80, "float32", "7b"), (80, "float16", "ones")):
        print(f"compute capability {capability / 10}, {dtype}, sizes {name}")
        driver.set_active(AbsentGpu(capability))
        with CompileOnly():
            launch_all(Case(tokens=2, dtype=getattr(torch, dtype), **CASES[name]))


if __name__ == "__main__":
    main()
