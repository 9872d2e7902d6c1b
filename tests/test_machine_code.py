"""What each NVRTC makes of the kernels for each GPU: registers and local memory as the machine code
says, and accesses of 16 bytes as the PTX does. No GPU is needed.

``make kernels`` compiles every kernel with every NVRTC for every GPU that this knows, which takes
eight minutes; here each kernel is compiled once, and each pair of NVRTC and GPU is.
"""

from __future__ import annotations

import re
from typing import Any

import compiled_kernels
import nvrtc
from ptx.tables import rule_of

import fusedopt
from bench import kernel_model

# Stored kernels that would spill with four blocks on a multiprocessor: by a third state, or by one
# coefficient more.
THREE_BLOCKS = re.compile(
    "(AdamUpdate_float_true|NAdamUpdate_float|RMSpropUpdate_float_true_true)_stored_"
)


def blocks_wanted(kernel: str) -> int:
    if "_stored_" not in kernel:
        return 2
    return 3 if THREE_BLOCKS.search(kernel) else 4


def pairs() -> list[tuple[nvrtc.Nvrtc, int]]:
    return [(compiler, gpu) for compiler in nvrtc.compilers() for gpu in compiler.architectures]


def problem_of(module: Any, compiler: nvrtc.Nvrtc, kernel: str, gpu: int) -> str | None:
    cubin = compiler.cubin(module, kernel, gpu)
    blocks = kernel_model.blocks_of(cubin.registers, gpu)
    if blocks >= blocks_wanted(kernel) and cubin.local_bytes == 0:
        return None
    return (
        f"{kernel}, {compiler}, sm_{gpu}: {cubin.registers} registers, {blocks} blocks, "
        f"{cubin.local_bytes} bytes of local memory"
    )


def test_every_kernel_fits_the_registers(kernels):
    compiled_kernels.require_compiler()
    names, all_pairs = kernels.kernels(), pairs()
    wanted = [
        (compiler, kernel, gpu)
        for k, kernel in enumerate(names)
        for n, (compiler, gpu) in enumerate(all_pairs)
        if compiled_kernels.ALL or n == k % len(all_pairs)
    ]
    problems = [problem_of(kernels, *choice) for choice in wanted]
    assert [problem for problem in problems if problem] == []


SIXTEEN_BYTES = re.compile(r"\b(ld|st)\.global(?:\.\w+)*\.(?:v4\.[busf]32|v2\.[busf]64)\b")


def test_memory_moves_16_bytes_at_a_time(kernels):
    compiler = compiled_kernels.require_compiler()
    for kernel in kernels.kernels():
        found = set(SIXTEEN_BYTES.findall(compiled_kernels.ptx_of(compiler, kernels, kernel)))
        assert found == ({"ld"} if kernel.endswith("grad_norm") else {"ld", "st"}), kernel


FENCE = r"(?:membar\.gl|fence\.(?:sc|acq_rel)\.gpu)"
TICKET = re.compile(
    rf"{FENCE};\s+atom\.global\.inc\.u32\s+(%r\d+), \[%rd\d+\], (%r\d+);"  # released before it
    r"\s+setp\.(ne|eq)\.s32\s+(%p\d+), \1, \2;"
    rf"\s+@(!?)\4\s+bra\s+\S+;\s+{FENCE};"  # and who has the last one acquires
)


def test_who_gets_the_last_ticket_sees_what_others_did(kernels):
    """The machine in ptx/ knows no weak order of memory: that the fences are there is read."""
    compiler = compiled_kernels.require_compiler()
    counts = {}
    for kernel in kernels.kernels():
        text = compiled_kernels.ptx_of(compiler, kernels, kernel)
        text = re.sub(r"//[^\n]*", "", text)  # where inline assembly begins and ends
        counts[kernel] = len(re.findall(r"\batom\.", text))
        fenced = TICKET.findall(text)
        assert len(fenced) == counts[kernel], kernel
        assert all((compares == "ne") == (negated == "") for _, _, compares, _, negated in fenced)
    # Where nothing is counted on the device, nobody takes one.
    countless = {kernel for kernel, count in counts.items() if count == 0}
    rules = kernels.rules()
    assert countless == {
        kernel for kernel in counts if (rule := rule_of(kernel)) and not rules[rule]["scalars"]
    }


def test_what_is_read_from_machine_code(kernels):
    """A kernel with an array that is too large for registers and indexed by what it is given."""
    source = """
    extern "C" __global__ void spilling(const int* from, int* to) {
      int kept[100];
      for (int i = 0; i < 100; ++i) kept[i] = from[i];
      to[0] = kept[from[100]];
    }"""
    cubin = compiled_kernels.require_compiler().assemble(source, ["--gpu-architecture=sm_90"])
    assert cubin.local_bytes >= 400
    assert 0 < cubin.registers <= 255


def test_the_model_of_kernels(kernels, monkeypatch, capsys):
    compiled_kernels.require_compiler()
    monkeypatch.setattr(fusedopt.backend, "native", kernels)
    kernel_model.main(["--kernels", "SGDUpdate_float_true", "--gpus", "90"])
    found = re.findall(
        r"^fusedopt_(\w+) sm_90: (\d+) registers, (\d+) blocks", capsys.readouterr().out, re.M
    )
    assert [name.partition("_stored_")[0] for name, *_ in found] == ["SGDUpdate_float_true"] * 2
    assert all(int(registers) * int(blocks) <= 256 for _, registers, blocks in found)


LOOP = """
        /*0000*/                   LDG.E R0, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P0 LDG.E.EF.128 R8, desc[UR4][R2.64] ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   CALL.REL.NOINC `($a_rare_root) ;
.L_x_2:
        /*0050*/               @P2 BRA `(.L_x_3) ;
        /*0060*/                   MUFU.RSQ R0, R9 ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0080*/               @P3 BRA `(.L_x_4) ;
        /*0090*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
.L_x_4:
        /*00a0*/               @P1 BRA P2, `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""


def test_a_loop_of_machine_code():
    """Without what is called, and the root that most turns go around, but with all stores."""
    (loop,) = kernel_model.loops_of(LOOP)
    names = [name.split(".")[0] for name in loop.operations]
    assert names == ["LDG", "LDG", "BRA", "BRA", "BRA", "STG", "BRA"]
    assert (loop.moved("LDG"), loop.moved("STG")) == ([16, 16], [16])
