"What the mutants change is there: a mutant whose line was edited would test nothing."
import pytest
from mutants import HERE, MUTANTS, place

def test_names_are_unique():
    names = [m[0] for m in MUTANTS]
    assert len(set(names)) == len(names)

@pytest.mark.parametrize('mutant', MUTANTS, ids=[m[0] for m in MUTANTS])
def test_its_line_is_there_exactly_as_written(mutant):
    _, tests, old, new = mutant
    assert place(mutant).is_file() and old != new
    assert (HERE/tests.partition(' -k ')[0]).is_file()
