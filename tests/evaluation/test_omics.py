"""Omics of patients: six groups of genes."""

import zipfile

import numpy as np
import pytest

from gigatome.core.errors import CohortError
from gigatome.evaluation.omics import GROUPS, read_omics

SIGNATURES = (
    "Tumor Suppressor Genes,Oncogenes,Protein Kinases,Cell Differentiation Markers,Transcription Factors,"
    "Cytokines and Growth Factors\nTP53,ABL1,ABL1,CD4,TP53,IL2\nRB1,,,CD8A,,\n"
)
HEADER = ",case_id,slide_id,survival_months,IL2_rnaseq,TP53_rnaseq,TP53_mut,ABL1_cnv,CD4_rnaseq,RB1_cnv,UNUSED_cnv"


def files(tmp_path, *rows, signatures=SIGNATURES, header=HEADER):
    (tmp_path / "signatures.csv").write_text(signatures)
    with zipfile.ZipFile(tmp_path / "omics.csv.zip", "w") as archive:
        archive.writestr("../omics.csv", "\n".join((header, *rows)) + "\n")
    return tmp_path / "omics.csv.zip", tmp_path / "signatures.csv"


def test_columns_of_each_group_are_sorted_by_name(tmp_path):
    omics = read_omics(
        *files(tmp_path, "0,p0,s0,3,10,1.5,1,-2,4,2,9", "1,p1,s1,3,11,2.5,0,2,5,-1,9", "2,p1,s2,3,11,2.5,0,2,5,-1,9")
    )
    assert list(omics) == ["p0", "p1"]
    found = [group.tolist() for group in omics["p0"]]
    assert found == [[2, 1, 1.5], [-2], [-2], [4], [1, 1.5], [10]]  # RB1_cnv, TP53_mut, TP53_rnaseq
    assert len(found) == len(GROUPS) == 6
    assert all(group.dtype == np.float32 for group in omics["p0"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0,p0,s0,3,10,1.5,x,-2,4,2,9",), "TP53_mut of patient p0 is 'x', no finite number"),
        (("0,p0,s0,3,10,,1,-2,4,2,9",), "TP53_rnaseq of patient p0 is '', no finite number"),
        (("0,p0,s0,3,nan,1.5,1,-2,4,2,9",), "IL2_rnaseq of patient p0 is 'nan'"),
        (("0,p0,s0,3,1e300,1.5,1,-2,4,2,9",), "beyond float32"),
        (("0,p0,s0,3,10,1.5,1,-2,4,2,9", "1,p0,s1,3,11,1.5,1,-2,4,2,9"), "two rows of patient p0 differ"),
    ],
)
def test_omics_that_do_not_do(tmp_path, rows, message):
    with pytest.raises(CohortError, match=message):
        read_omics(*files(tmp_path, *rows))


def test_tables_that_do_not_fit(tmp_path):
    with pytest.raises(CohortError, match="no column names the patients"):
        read_omics(*files(tmp_path, "0,s", header=",slide_id"))
    with pytest.raises(CohortError, match="no column of a gene of B, such as XYZ_mut"):
        read_omics(*files(tmp_path, "0,p0,s0,3,10,1,1,-2,4,2,9", signatures="A,B\nTP53,XYZ\n"))
