"""C++ programs in cpp/ run under the address, undefined-behaviour and thread sanitizers.

Each program is one file with a main() that returns 0 when its property holds. It includes headers of csrc/, and is
linked with the sources of csrc/host/ that bind nothing to Python (all but version.cc and *_bindings.cc).
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native_tools import CSRC, load_setup

PROGRAMS = sorted((Path(__file__).parent / "cpp").glob("*.cc"))
SANITIZERS = ("address,undefined", "thread")
COMPILER = load_setup().find_compiler()
# One object per source file and sanitizer serves all programs.
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CSRC}", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILER, reason="no C++20 compiler (g++) is installed"),
]


def compile_program(arguments: list[object], output: Path, sanitizer: str) -> Path:
    command = [*COMPILER, *FLAGS, f"-fsanitize={sanitizer}", *map(str, arguments), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def run_program(program: Path) -> "subprocess.CompletedProcess[str]":
    # The thread sanitizer of older compilers cannot live with the address randomisation of newer kernels.
    fixed_addresses = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    # Nothing may come before the sanitizer's own library, and an engine in this process preloads some for its workers.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for prefix in ([], fixed_addresses):
        done = subprocess.run(
            [*prefix, str(program)], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        if "unexpected memory mapping" not in done.stderr:
            break
    return done


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The objects of csrc/host/ for a sanitizer, compiled when first asked for."""
    made: dict[str, list[Path]] = {}

    def of(sanitizer: str) -> list[Path]:
        if sanitizer not in made:
            folder = tmp_path_factory.mktemp("objects")
            sources = [path for path in sorted((CSRC / "host").glob("*.cc")) if not binds_to_python(path)]
            made[sanitizer] = [compile_program(["-c", path], folder / f"{path.stem}.o", sanitizer) for path in sources]
        return made[sanitizer]

    return of


def binds_to_python(source: Path) -> bool:
    return source.name == "version.cc" or source.stem.endswith("_bindings")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program_holds_its_property_under(program, sanitizer, objects, tmp_path):
    done = run_program(compile_program([program, *objects(sanitizer)], tmp_path / program.stem, sanitizer))
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = {
    "a read behind the end": (
        "address,undefined",
        "int main(int n, char**) { volatile int* p = new int[4]{}; p[3 + n] = 1; delete[] p; return 0; }",
        "heap-buffer-overflow|insufficient space",
    ),
    "an overflow of int": (
        "address,undefined",
        "int main(int n, char**) { volatile int big = 2147483647; big = big + n; return 0; }",
        "signed integer overflow",
    ),
    "two threads on one word": (
        "thread",
        "#include <thread>\nint x; int main() { std::thread t([] { x = 1; }); x = 2; t.join(); return 0; }",
        "data race",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_sanitizers_find(fault, tmp_path):
    sanitizer, source, message = FAULTS[fault]
    (tmp_path / "fault.cc").write_text(source)
    done = run_program(compile_program([tmp_path / "fault.cc"], tmp_path / "fault", sanitizer))
    assert done.returncode != 0
    assert any(text in done.stderr for text in message.split("|")), done.stderr


def test_a_program_that_fails_is_reported(tmp_path):
    (tmp_path / "fails.cc").write_text("int main() { return 3; }\n")
    assert run_program(compile_program([tmp_path / "fails.cc"], tmp_path / "fails", "thread")).returncode == 3
