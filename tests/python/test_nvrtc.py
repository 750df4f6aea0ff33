"""The CUDA kernels compile with NVRTC, which has no standard headers."""

from __future__ import annotations

import locale
import sys

import pytest
from tree import REPOSITORY, tracked

sys.path.append(str(REPOSITORY / "tools"))

import nvrtc  # noqa: E402

KERNELS = REPOSITORY / "kernels"
HEADERS = sorted(path.relative_to(KERNELS).as_posix() for path in tracked("kernels/**/*.cuh"))

# A kernel of each header that defines some: the dearest one.
INSTANTIATED = {
    "elementwise/bias_activation.cuh": [
        "bias_activation::forward_kernel<fp16, Activation::gelu_erf, false>",
        "bias_activation::backward_kernel<bf16, Activation::silu_gate, true>",
    ],
    "elementwise/kvcache_append.cuh": [
        "kvcache_append::kernel<bf16, 8>",
        "kvcache_append::kernel<fp32, 1>",
    ],
    "sm80/backward_far_rows.cuh": ["sm80::far_rows_kernel<fp16>"],
    "sm80/backward_keys.cuh": [
        "sm80::keys_kernel<fp16, 96, 96, Extras::all, 100>",
        "sm80::keys_kernel<bf16, 256, 256, Extras::dropout, 164>",
    ],
    "sm80/backward_queries.cuh": [
        "sm80::queries_kernel<bf16, 192, 128, Extras::all, 100>",
    ],
    "sm80/backward_rows.cuh": [
        "sm80::prepare_kernel<fp16, 192, 128>",
        "sm80::sinks_kernel<bf16>",
        "sm80::finish_kernel<bf16, 64, 164>",
    ],
    "sm80/combine.cuh": ["sm80::combine_kernel<fp16>"],
    "sm80/decode.cuh": [
        "sm80::decode_kernel<bf16, 192, 128, Extras::score_mod, true>",
    ],
    "sm80/forward.cuh": [
        "sm80::forward_kernel<fp16, 64, 64, Extras::all, true, 100>",
    ],
}


@pytest.mark.parametrize("sm", (75, 80, 100))
@pytest.mark.parametrize("header", HEADERS)
def test_headers_need_no_host_compiler(header, sm, tmp_path):
    """With the two versions that what ships is compiled with."""
    library = nvrtc.find(sm)
    if library is None:
        pytest.skip(f"no NVRTC that knows sm_{sm}")
    if sm == 75 and header.startswith("sm80/"):
        pytest.skip("its kernels are for sm_80 and newer")
    uses = "".join(f"  use = (void*)&{name};\n" for name in INSTANTIATED.get(header, []))
    source = tmp_path / "a.cu"
    source.write_text(
        f'#include "kernels/{header}"\nusing namespace anyflash;\n'
        f"void instantiate() {{\n  void* use;\n{uses}}}\n"
    )
    assert library.compile(source, f"sm_{sm}", (f"-I{REPOSITORY}",)).code


@pytest.mark.parametrize("sm", (75, 100))
def test_the_locale_stays(sm, tmp_path):
    """NVRTC 12.4 changes it."""
    library = nvrtc.find(sm)
    if library is None:
        pytest.skip(f"no NVRTC that knows sm_{sm}")
    (tmp_path / "a.cu").write_text("__global__ void kernel() {}")
    before = locale.nl_langinfo(locale.CODESET)
    library.compile(tmp_path / "a.cu", f"sm_{sm}")
    assert locale.nl_langinfo(locale.CODESET) == before


def test_every_header_with_kernels_is_instantiated():
    with_kernels = [name for name in HEADERS if "__global__" in (KERNELS / name).read_text()]
    assert with_kernels == sorted(INSTANTIATED)
