"""C++ programs in cpp/ run under the address, undefined-behaviour and thread sanitizers.

Each program is one file with a main() that returns 0 when its property holds. It includes headers of csrc/, and is
linked with the sources of csrc/host/ that bind nothing to Python (all but version.cc and *_bindings.cc).
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
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
            [*prefix, str(program)], env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        if "unexpected memory mapping" not in done.stderr:
            break
    return done


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """(program, sanitizer) -> its executable, all compiled when first asked for, two at a time."""
    folder = tmp_path_factory.mktemp("programs")
    sources = [path for path in sorted((CSRC / "host").glob("*.cc")) if not binds_to_python(path)]
    with ThreadPoolExecutor(2) as pool:
        made: dict[tuple[str, str], Future[Path]] = {}
        for sanitizer in SANITIZERS:
            objects = [folder / f"{path.stem}-{sanitizer}.o" for path in sources]
            list(pool.map(lambda path, to, by=sanitizer: compile_program(["-c", path], to, by), sources, objects))
            for path in PROGRAMS:
                to = folder / f"{path.stem}-{sanitizer}"
                made[path.stem, sanitizer] = pool.submit(compile_program, [path, *objects], to, sanitizer)
        yield made


def binds_to_python(source: Path) -> bool:
    return source.name == "version.cc" or source.stem.endswith("_bindings")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program_holds_its_property_under(program, sanitizer, programs):
    done = run_program(programs[program.stem, sanitizer].result())
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
