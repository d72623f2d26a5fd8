"""Every name of vLLM that the plugin touches: there in each supported release, and missed where it is not."""

import ast
from pathlib import Path

import pytest
from vllm_sources import Unreachable, sources

import vllm_expert_prefetch
from vllm_expert_prefetch.cli import main as cli
from vllm_expert_prefetch.serving import compat, seams
from vllm_expert_prefetch.serving.seams import FOUND, MISSING, SEAMS, files_of_seams, find_seams, installed_vllm

RELEASES = ("0.26.0", "0.30.0", "0.33.0")
"""The ends of the supported range, and one between. A new release is one more here, and BEYOND in `compat`."""


@pytest.mark.parametrize("version", RELEASES)
def test_a_supported_release_has_every_name_as_it_is_expected(version):
    compat.check_version(version, on_cpu=False)
    try:
        vllm = sources(version, ["version.py", *files_of_seams()])
    except Unreachable as error:
        pytest.skip(f"no package index here: {error}")
    assert {seam: state for seam, state in find_seams(vllm).items() if state != FOUND} == {}


def test_the_ends_of_the_supported_range_are_among_these_releases():
    assert f"{compat.LOWEST}.0" == RELEASES[0]
    with pytest.raises(RuntimeError, match="not supported"):
        compat.check_version(str(compat.BEYOND), on_cpu=False)
    major, minor = compat.BEYOND.release
    assert f"{major}.{minor - 1}.0" == RELEASES[-1]


def test_the_installed_release_has_every_name():
    vllm = installed_vllm()
    assert vllm is not None
    assert set(find_seams(vllm).values()) == {FOUND}


def test_everything_that_the_plugin_imports_from_vllm_is_a_seam():
    package = Path(vllm_expert_prefetch.__file__).parent
    imported = set()
    for path in [*(package / "serving").glob("*.py"), package / "plugin.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                imported |= {(node.module, alias.name) for alias in node.names}
    tops = {(seam.split(":")[0], seam.split(":")[1].split(".")[0].split("(")[0]) for seam in SEAMS}
    modules = {module for module, _ in tops}
    for module, name in imported:
        inside = (module or "").removeprefix("vllm").lstrip(".")
        as_module = f"{inside}.{name}".lstrip(".")
        assert (inside, name) in tops or as_module in modules, f"{module}:{name}"


VLLM = {
    "version.py": "__version__ = '0.99'",
    "forward_context.py": """
        import dataclasses
        if True:
            def get_forward_context(): ...
        @dataclasses.dataclass
        class ForwardContext(Base):
            attn_metadata: dict
            def __init__(self):
                self.slot_mapping = {}
        class Base:
            no_compile_layers: dict
    """,
    "model_executor/model_loader/base_loader.py": """
        class BaseModelLoader:
            def load_model(self, config, vllm_config): ...
    """,
    "platforms/__init__.py": "def __getattr__(name):\n    return 1 if name == 'current_platform' else None",
    "envs.py": "import os\nvalues = {'VLLM_USE_BREAKABLE_CUDAGRAPH': lambda: os.environ}",
}


@pytest.fixture
def vllm(tmp_path):
    """A few of vLLM's files, and the names that they bind."""
    for name, text in VLLM.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix("        ") for line in text.splitlines()))
    return tmp_path / "vllm"


def test_a_name_is_found_wherever_a_module_or_class_binds_it_and_missed_elsewhere(vllm):
    found = find_seams(vllm)
    assert found["version:__version__"] == FOUND
    assert found["platforms:current_platform"] == FOUND, "modules may make names when they are asked for"
    assert found["envs:VLLM_USE_BREAKABLE_CUDAGRAPH"] == FOUND
    assert found["forward_context:get_forward_context()"] == FOUND, "in a branch"
    members = [found[f"forward_context:ForwardContext.{name}"] for name in ("attn_metadata", "slot_mapping")]
    assert members == [FOUND, FOUND], "a field, and an attribute of self"
    assert found["forward_context:ForwardContext.no_compile_layers"] == FOUND, "of a base class"
    assert found["forward_context:is_forward_context_available()"] == MISSING
    assert found["logger:init_logger"] == MISSING, "the module is not there"


def test_a_changed_signature_is_shown(vllm):
    seam = "model_executor.model_loader.base_loader:BaseModelLoader.load_model(vllm_config, model_config)"
    assert find_seams(vllm)[seam] == "(config, vllm_config)"


def test_doctor_prints_each_name_and_fails_where_one_is_lost(vllm, capsys):
    assert cli.main(["doctor", "--seams", str(vllm)]) == 1
    printed = capsys.readouterr().out
    assert "found    vllm.version:__version__" in printed
    assert "MISSING  vllm.logger:init_logger" in printed
    assert "CHANGED, now (config, vllm_config): vllm.model_executor.model_loader.base_loader" in printed
    assert f"of {len(SEAMS)} names are as the plugin expects them in {vllm}" in printed


def test_doctor_of_the_installed_vllm_succeeds_and_of_nothing_says_what_to_give(capsys, tmp_path):
    assert cli.main(["doctor", "--seams", "installed", "--json"]) == 0
    assert '": "found"' in capsys.readouterr().out
    assert cli.main(["doctor", "--seams", str(tmp_path)]) == 2
    assert "give the folder that holds its version.py" in capsys.readouterr().err


def test_a_lost_name_is_a_problem_of_this_installation(monkeypatch):
    from vllm_expert_prefetch.cli import doctor

    monkeypatch.setattr(seams, "find_seams", lambda vllm: {"logger:init_logger": MISSING, "a:b": FOUND})
    report = doctor.examine()
    assert report["seams"] == {"found": 1, "lost": {"logger:init_logger": MISSING}}
    assert "vllm.logger:init_logger is missing, and the plugin needs it as it was" in report["problems"]
