"""Builds the C++ extension where there is a compiler; everything runs without it.

With a CUDA build of torch and a CUDA toolkit (nvcc), the CUDA kernels are built into it, for the
architectures of TORCH_CUDA_ARCH_LIST (default: 8.0, 9.0 and PTX of 9.0).

EMBCOMPRESS_BUILD_EXTENSION=0 never builds it, =1 makes a failure to build it an error.
EMBCOMPRESS_BUILD_CUDA=0 leaves the CUDA kernels out, =1 makes a failure to build them an error.
EMBCOMPRESS_SANITIZE=1 builds it with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

CHOICE = os.environ.get("EMBCOMPRESS_BUILD_EXTENSION", "auto")
CUDA_CHOICE = os.environ.get("EMBCOMPRESS_BUILD_CUDA", "auto")
SANITIZE = os.environ.get("EMBCOMPRESS_SANITIZE") == "1"
#: Machine code for A100 and H100, and PTX that later devices compile for themselves.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
#: The oldest torch whose stable ABI the extension needs: torch::stable::parallel_for.
STABLE_ABI = "0x020a000000000000"


def say(text: str) -> None:
    print(f"embcompress: {text}", file=sys.stderr, flush=True)


def has_compiler() -> bool:
    compiler = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
    return any(shutil.which(name) for name in (compiler, "c++", "g++", "clang++"))


def why_not() -> str | None:
    """Why the extension is not built; None if it is."""
    if CHOICE == "0":
        return "EMBCOMPRESS_BUILD_EXTENSION=0"
    if not has_compiler():
        return "no C++ compiler was found"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment (use --no-build-isolation)"
    return None


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are not built; None if they are."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_CHOICE == "0":
        return "EMBCOMPRESS_BUILD_CUDA=0"
    if SANITIZE:
        return "sanitizers are for the CPU engine"
    if torch.version.cuda is None:
        return "this torch is a build without CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "no CUDA toolkit (nvcc) was found; set CUDA_HOME"
    return None


def shared_runtimes() -> list[str]:
    """Paths of the C++ runtime that torch has loaded, to be linked to.

    Errors are exceptions that cross into torch. A compiler that would link a runtime of its own
    into the extension, statically, makes each the end of the process.
    """
    import torch  # noqa: F401

    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return []
    loaded = [Path(line.split(maxsplit=5)[-1]) for line in lines if "/" in line]
    names = ("libstdc++.so.6", "libgcc_s.so.1")
    found = {name: path for name in names for path in loaded if path.name.startswith(name)}
    return [str(found[name]) for name in names if name in found and found[name].exists()]


def extension_arguments() -> dict[str, object]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    no_cuda = why_no_cuda()
    if no_cuda is not None and CUDA_CHOICE == "1":
        raise SystemExit(f"embcompress: the CUDA kernels were asked for, but {no_cuda}")
    if no_cuda is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        built = f"the CPU engine and CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']}"
    else:
        built = f"the CPU engine; no CUDA kernels: {no_cuda}"

    class OptionalBuildExtension(BuildExtension):
        """A failure to compile leaves the package without its extension, and says so."""

        def run(self) -> None:
            try:
                super().run()
                say(f"built {built}{', with sanitizers' if SANITIZE else ''}")
            except Exception as error:
                if CHOICE == "1" or CUDA_CHOICE == "1":
                    raise
                say(f"the extension was NOT built, the pure-torch engine will be used: {error}")

        def copy_extensions_to_source(self) -> None:
            built = [Path(self.get_ext_fullpath(ext.name)).name for ext in self.extensions]
            if all((Path(self.build_lib) / "embcompress" / name).exists() for name in built):
                super().copy_extensions_to_source()

    sanitizers = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    cxx = [
        "-std=c++17",
        # Rounding must not depend on whether the compiler found a multiply-add.
        "-ffp-contract=off",
        # A square root is an instruction, not a call that may set errno.
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wall",
        # Vectors are only ever passed between functions that are inlined.
        "-Wno-psabi",
        *(sanitizers if SANITIZE else ["-O3"]),
    ]
    nvcc = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fvisibility=hidden,-Wall"]
    sources = [path for path in Path("csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    if no_cuda is not None:
        sources = [path for path in sources if path.parent.name != "cuda"]
    extension = (CppExtension if no_cuda else CUDAExtension)(
        "embcompress._C",
        sorted(map(str, sources)),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=[
            *shared_runtimes(),
            *(["-fsanitize=address,undefined"] if SANITIZE else []),
        ],
        define_macros=[
            ("TORCH_TARGET_VERSION", STABLE_ABI),
            *([] if no_cuda else [("USE_CUDA", None)]),
        ],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.*h")),
        py_limited_api=True,
    )
    # Ninja compiles files side by side; torch warns where it is asked for and is not there.
    use_ninja = shutil.which("ninja") is not None
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuildExtension.with_options(use_ninja=use_ninja)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = why_not()
if reason is not None:
    if CHOICE == "1":
        raise SystemExit(f"embcompress: the extension was asked for, but {reason}")
    say(f"the CPU engine is not built ({reason}); the pure-torch one will be used")
setup(**({} if reason is not None else extension_arguments()))  # type: ignore[arg-type]
