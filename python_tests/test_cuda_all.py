"""benchmarks/cuda_all.py: what it reads out of ptxas' messages."""

import shutil

import cuda_all
import pytest

SAID = """\
ptxas info    : 64 bytes gmem
ptxas info    : Compiling entry function '_ZN6calora4cuda39_GLOBAL__N__1ab8cf2a_7_bank_cu_81f117409bank_downILi1ELb1EEEvNS0_10LinearArgsE' for 'sm_80'
ptxas info    : Function properties for _ZN6calora4cuda39_GLOBAL__N__1ab8cf2a_7_bank_cu_81f117409bank_downILi1ELb1EEEvNS0_10LinearArgsE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size, 256 bytes smem, 592 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6calora4cuda39_GLOBAL__N__1ab8cf2a_7_bank_cu_81f117409copy_rowsEPhlPKhl' for 'sm_80'
ptxas info    : Function properties for _ZN6calora4cuda39_GLOBAL__N__1ab8cf2a_7_bank_cu_81f117409copy_rowsEPhlPKhl
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt was not found")
def test_spills_are_told_by_kernel():
    assert cuda_all.compiled(SAID) == {"bank_down<1, true>": 4, "copy_rows": 0}
    assert cuda_all.compiled("ptxas info    : 0 bytes gmem") == {}
