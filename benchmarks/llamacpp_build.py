"""A build folder of llama.cpp: what it was built with, and our tools linked to its library."""

from __future__ import annotations

from pathlib import Path

from benchmarks.command import run

#: Of the peer's build, kept with the results.
BUILD_OPTIONS = (
    "CMAKE_BUILD_TYPE", "CMAKE_CXX_FLAGS", "CMAKE_CXX_FLAGS_RELEASE", "GGML_NATIVE", "GGML_OPENMP",
    "GGML_CPU_REPACK", "GGML_LLAMAFILE", "GGML_BLAS",
)  # fmt: skip

#: Where that build says its sources are.
SOURCE = "llama.cpp_SOURCE_DIR"


def build_facts(build: Path) -> dict[str, str]:
    """Options of a CMake build that decide about its speed, and where its sources are."""
    found = {}
    for line in (build / "CMakeCache.txt").read_text().splitlines():
        key, _, value = line.partition("=")
        found[key.partition(":")[0]] = value
    return {k: found.get(k, "") for k in (*BUILD_OPTIONS, SOURCE)}


def version_of(build: Path) -> str:
    """Of the library in a build, as its file is called: llama.cpp counts its builds elsewhere.
    SystemExit if it is not built."""
    library = build / "bin/libllama.so"
    if not library.exists():
        raise SystemExit(f"{library}: no such file; build llama.cpp there, target llama")
    return library.resolve().name.partition(".so.")[2]


def compile_tool(name: str, build: Path, folder: Path) -> Path:
    """One of our tools, ``{name}.cpp``, linked to the library of a build, in a folder."""
    source, libraries = Path(build_facts(build)[SOURCE]), (build / "bin").resolve()
    tool = folder / name
    command = [
        "g++", "-O2", "-std=c++17", f"-I{source / 'include'}", f"-I{source / 'ggml/include'}",
        str(Path(__file__).with_name(f"{name}.cpp")), "-o", str(tool), f"-L{libraries}",
        "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    run(command)
    return tool
