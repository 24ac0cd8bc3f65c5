"""AUROC, its variance and paired differences against the example of DeLong et al. 1988 (Biometrics 44), section 3.

43 of its 49 patients with ovarian cancer have all three tests; their values and the results below are in the SAS/STAT
User's Guide, The LOGISTIC Procedure, "Comparing Receiver Operating Characteristic Curves" (support.sas.com,
statug 63962, example 53.8), where the event is that a patient did not benefit from surgery.
"""

import math

import pytest
import torch

from agglom.core import influence, metrics

# Albumin, total protein, Krebs-Goplerud score, no benefit (0) or benefit (1) as the guide lists them.
PATIENTS = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1
3.8 5.7 5 1   3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0
2.3 4.4 6 1   4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1
3.1 6.6 6 1   4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0
3.7 6.1 5 1   3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1
3.3 5.7 6 1   3.7 6.9 5 1  3.6 6.6 5 1
"""
TABLE = torch.tensor([float(cell) for cell in PATIENTS.split()], dtype=torch.float64).view(-1, 4)
SCORES = {"albumin": -TABLE[:, 0], "total protein": -TABLE[:, 1], "K-G": TABLE[:, 2]}
EVENT, PATIENT = 1 - TABLE[:, 3], torch.arange(len(TABLE))


def linear(test):
    return influence.linearise("auroc", EVENT.bool(), SCORES[test], math.nan, PATIENT)


@pytest.mark.parametrize(
    ("test", "area", "error"),
    [("albumin", 0.7366, 0.0927), ("K-G", 0.7258, 0.1028), ("total protein", 0.6478, 0.1000)],
)
def test_areas_and_their_standard_errors_are_those_published(test, area, error):
    found = metrics.evaluate("auroc", EVENT, SCORES[test], PATIENT)
    assert (found.n, found.n_pos) == (43, 12)
    assert found.value == pytest.approx(area, abs=5e-5)
    assert math.sqrt(influence.moments(linear(test)).variance) == pytest.approx(error, abs=5e-5)


@pytest.mark.parametrize(
    ("test", "difference", "error", "p"),
    [("albumin", 0.0108, 0.0953, 0.9102), ("total protein", -0.0780, 0.1046, 0.4561)],
)
def test_paired_differences_are_those_published(test, difference, error, p):
    value, moments = influence.less(linear(test), linear("K-G"))
    assert value == pytest.approx(difference, abs=5e-5)
    assert math.sqrt(moments.variance) == pytest.approx(error, abs=5e-5)
    # The published test refers to the normal distribution.
    assert math.erfc(abs(value) / math.sqrt(2 * moments.variance)) == pytest.approx(p, abs=5e-5)
    found = metrics.paired("auroc", EVENT, SCORES[test], SCORES["K-G"], PATIENT)
    assert found.value == pytest.approx(value, abs=1e-12)
    # Student's t and the allowance for skewness make ours wider.
    assert found.lo < value - 1.96 * error
    assert found.hi > value + 1.96 * error
    assert metrics.paired_p("auroc", EVENT, SCORES[test], SCORES["K-G"], PATIENT) > p
