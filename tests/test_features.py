"""The table of features: nothing stands there that no test has proved, and all that is proved or refused does."""

from types import SimpleNamespace

import proofs
import pytest
from doc_tables import documented, features_table
from proofs import Proof, Writer, marked, read_proofs

from vllm_expert_prefetch.serving.refusals import LAYER_REFUSALS, REFUSALS

LOOKS = Proof("looking ahead", "cpu", "", "tests/test_some.py::test_it_looks_ahead")
STEPS = Proof("steps", "shim", "in one go", "tests/test_some.py::test_it_steps")
SOURCE = """
@pytest.mark.proves("looking ahead")
@pytest.mark.proves("steps", "shim", says="in one go")
def test_it_looks_ahead():
    pass

@pytest.mark.parametrize("a", [pytest.param(2, marks=pytest.mark.proves("steps", says="in one go", platform="shim"))])
def test_it_steps(a):
    pass

@pytest.mark.proves("looking ahead")
def not_a_test():
    pass

def test_that_proves_nothing():
    pytest.mark.proves("looking ahead")
"""


def test_every_proof_that_a_test_is_marked_with_has_passed_and_no_other_is_known():
    assert read_proofs() == marked(), "make features"
    assert len(read_proofs()) > 20


def test_marks_are_found_where_pytest_finds_them(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(SOURCE)
    (folder / "some.py").write_text(SOURCE)
    assert marked(folder) == {LOOKS, STEPS, STEPS._replace(test=LOOKS.test)}


def test_pytest_hands_a_tests_marks_to_its_report(pytestconfig):
    marks = {"proves": [pytest.mark.proves("steps", "shim").mark]}
    item = SimpleNamespace(user_properties=[], iter_markers=marks.__getitem__)
    assert pytestconfig.pluginmanager.is_registered(proofs)
    proofs.pytest_collection_modifyitems([item])
    assert item.user_properties == [("proves", ("steps", "shim", "", ""))]


def report(proof, passed=True, case=""):
    given = tuple(proof._replace(test=""))
    return SimpleNamespace(nodeid=proof.test + case, passed=passed, user_properties=[("other", 1), ("proves", given)])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(reports)`: what the file holds after a session with these."""
    monkeypatch.setattr("proofs.marked", lambda: {LOOKS, STEPS})

    def write(*reports):
        writer = Writer(tmp_path / "features.json")
        for one in reports:
            writer.pytest_runtest_logreport(one)
        writer.pytest_sessionfinish()
        return read_proofs(tmp_path / "features.json")

    return write


def test_what_passed_is_written_and_what_did_not_run_is_kept(write):
    assert write(report(LOOKS)) == {LOOKS}
    assert write(report(STEPS, case="[1]"), report(STEPS, case="[2]")) == {LOOKS, STEPS}
    assert write() == {LOOKS, STEPS}


@pytest.mark.parametrize("order", [1, -1])
def test_a_case_or_a_phase_that_did_not_pass_takes_the_proof_out(write, order):
    assert write(report(LOOKS), report(STEPS)) == {LOOKS, STEPS}
    assert write(*[report(STEPS, case="[1]"), report(STEPS, False, case="[2]")][::order]) == {LOOKS}


def test_what_no_test_is_marked_with_is_taken_out(write):
    assert write(report(LOOKS), report(LOOKS._replace(feature="no more"))) == {LOOKS}


def test_a_platform_that_there_is_none_of_is_an_error():
    with pytest.raises(AssertionError, match="tpu"):
        Writer(None).pytest_runtest_logreport(report(LOOKS._replace(platform="tpu")))


def test_the_documented_table_is_what_was_proved_and_what_is_refused():
    table = features_table()
    assert documented("features") == table, "python tests/doc_tables.py brings it up to date"
    lines = ([cell.strip() for cell in line[2:-2].split(" | ")] for line in table.splitlines())
    rows = {cells[0]: cells for cells in lines}
    proved = {proof.feature for proof in read_proofs()}
    assert rows.keys() >= proved
    for refusal in (*REFUSALS, *LAYER_REFUSALS):
        if refusal.what in proved:
            assert refusal.platform, "refused everywhere, and proven"
            assert refusal.remedy in rows[refusal.what][1 + (refusal.platform == "gpu")]
            continue
        only = getattr(refusal, "platform", "")
        cells = ["served" if only == other else "refused" for other in ("gpu", "cpu")]
        assert rows[f"{refusal.what} (`{refusal.flag}`)"][1:] == [*cells, refusal.remedy]
    assert {row[1] for row in rows.values()} > {"proven", "refused", "served"}
    assert {row[2] for row in rows.values()} > {
        "proven on the shim",
        "allowed; copies and kernels proved at your start",
        "refused",
    }
