"""Builds the C++ extension where there is a compiler; everything runs without it.

EMBCOMPRESS_BUILD_EXTENSION=0 never builds it, =1 makes a failure to build it an error.
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
SANITIZE = os.environ.get("EMBCOMPRESS_SANITIZE") == "1"
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


def extension_arguments() -> dict[str, object]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuildExtension(BuildExtension):
        """A failure to compile leaves the package without its extension, and says so."""

        def run(self) -> None:
            try:
                super().run()
                say(f"built the CPU engine{' with sanitizers' if SANITIZE else ''}")
            except Exception as error:
                if CHOICE == "1":
                    raise
                say(f"the CPU engine was NOT built, the pure-torch one will be used: {error}")

        def copy_extensions_to_source(self) -> None:
            built = [Path(self.get_ext_fullpath(ext.name)).name for ext in self.extensions]
            if all((Path(self.build_lib) / "embcompress" / name).exists() for name in built):
                super().copy_extensions_to_source()

    sanitizers = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    compile_arguments = [
        "-std=c++17",
        # Rounding must not depend on whether the compiler found a multiply-add.
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wall",
        # Vectors are only ever passed between functions that are inlined.
        "-Wno-psabi",
        *(sanitizers if SANITIZE else ["-O3"]),
    ]
    extension = CppExtension(
        "embcompress._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        extra_compile_args=compile_arguments,
        extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = why_not()
if reason is not None:
    if CHOICE == "1":
        raise SystemExit(f"embcompress: the extension was asked for, but {reason}")
    say(f"the CPU engine is not built ({reason}); the pure-torch one will be used")
setup(**({} if reason is not None else extension_arguments()))  # type: ignore[arg-type]
