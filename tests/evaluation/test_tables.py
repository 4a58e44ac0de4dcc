"""Published tables of labels load as they are, and what cannot be read is said."""

import io
import logging
import sys
import zipfile

import pytest

from gigatome.core.errors import CohortError, MissingExtraError
from gigatome.evaluation.tables import OMIC_SUFFIXES, detect_format, read_labels, read_table, read_task
from gigatome.evaluation.units import ClassTarget, SurvivalTarget, make_units
from gigatome.slides.cohort import Cohort, CohortSlide

UUID = "0BAAEF41-DCA4-4677-9A27-09E990033FA6"
A, B = f"TCGA-A2-A1FZ-01Z-00-DX1.{UUID}", f"TCGA-3C-AALJ-01Z-00-DX2.{UUID}"
CLAM = (
    "case_id,slide_id,label\npatient_0,slide_0,subtype_1\npatient_9,slide_9,subtype_2\npatient_9,slide_10,subtype_1\n"
)
HIPT = f",case_id,slide_id,oncotree_code\n0,TCGA-A2-A1FZ,{A}.svs,IDC\n1,TCGA-3C-AALJ,{B}.svs,ILC\n"
MCAT = (
    ",case_id,slide_id,site,is_female,oncotree_code,age,survival_months,censorship,train,TP53_mut,TP53_cnv,TP53_rnaseq\n"
    f"0,TCGA-A2-A1FZ,{A}.svs,A2,1.0,IDC,60,21.0,0.0,1.0,1,-1,0.5\n"
    f"1,TCGA-3C-AALJ,{B}.svs,3C,1.0,ILC,51,131.57,1.0,1.0,0,2,-0.25\n"
)
GIGASSL = f"ID,label,case_id\n{A},TNBC,TCGA-A2-A1FZ\n{B},luminal,TCGA-3C-AALJ\n"


def file(tmp_path, text, name="labels.csv"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def zipped(*members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in members:
            archive.writestr(name, text)
    return data.getvalue()


def workbook(rows):
    openpyxl = pytest.importorskip("openpyxl")
    book, data = openpyxl.Workbook(), io.BytesIO()
    for row in rows:
        book.active.append(row)
    book.save(data)
    return data.getvalue()


@pytest.mark.parametrize(
    ("text", "kind", "target", "level"),
    [
        (CLAM, "clam", ClassTarget("label"), "slide"),
        (HIPT, "hipt", ClassTarget("oncotree_code"), "slide"),
        (MCAT, "mcat", SurvivalTarget("survival_months", censorship="censorship"), "patient"),
        (GIGASSL, "giga-ssl", ClassTarget("label"), "slide"),
        ("PATIENT,isMSIH\np,yes\n", "stamp", None, "slide"),
        ("name,grade\na,1\n", "table", None, "slide"),
    ],
)
def test_the_format_and_its_target_are_known_by_the_columns(tmp_path, text, kind, target, level):
    path = file(tmp_path, text)
    assert detect_format(path) == kind
    task = read_task(path)
    assert (task.format, task.target, task.level) == (kind, target, level)


def test_clam(tmp_path):
    cohort = read_labels(file(tmp_path, CLAM))
    assert [(s.name, s.patient, s.labels) for s in cohort] == [
        ("slide_0", "patient_0", {"label": "subtype_1"}),
        ("slide_9", "patient_9", {"label": "subtype_2"}),
        ("slide_10", "patient_9", {"label": "subtype_1"}),
    ]
    assert make_units(cohort, ClassTarget("label")).outcome.y.tolist() == [0, 0, 1]  # slide_0, slide_10, slide_9


@pytest.mark.parametrize("archive", [False, True])
def test_hipt_zipped_or_not(tmp_path, archive):
    data = zipped(("../../tcga_brca_subset.csv", HIPT)) if archive else HIPT
    path = file(tmp_path, data, f"data/brca.csv{'.zip' if archive else ''}")
    cohort = read_labels(path)
    assert [(s.name, s.patient, dict(s.labels)) for s in cohort] == [
        (A, "TCGA-A2-A1FZ", {"oncotree_code": "IDC"}),
        (B, "TCGA-3C-AALJ", {"oncotree_code": "ILC"}),
    ]
    assert sorted(f.name for f in tmp_path.rglob("*")) == sorted(["data", path.name])  # nothing was extracted


def test_mcat_s_censorship_is_not_an_event_and_omics_are_no_labels(tmp_path):
    path = file(tmp_path, zipped(("__MACOSX/._x.csv", "junk"), ("./tcga.csv", MCAT)), "tcga_brca_all_clean.csv.zip")
    cohort = read_labels(path)
    assert not any(column.endswith(OMIC_SUFFIXES) for slide in cohort for column in slide.labels)
    task = read_task(path)
    units = make_units(cohort, task.target, level=task.level)
    assert units.names == ("TCGA-3C-AALJ", "TCGA-A2-A1FZ")
    assert units.outcome.time.tolist() == [131.57, 21]
    assert units.outcome.event.tolist() == [False, True]
    assert units.sites == ("3C", "A2")


def test_giga_ssl(tmp_path):
    cohort = read_labels(file(tmp_path, GIGASSL))
    assert [(s.name, s.patient, dict(s.labels)) for s in cohort] == [
        (A, "TCGA-A2-A1FZ", {"label": "TNBC"}),
        (B, "TCGA-3C-AALJ", {"label": "luminal"}),
    ]


CONFIG = (
    "task_col: subtype\nsample_col: case_id\nextra_cols: []\nlabel_dict: {0: IDC, 1: ILC}\nmetrics: [macro-ovr-auc]\n"
)
PATHO = "case_id\tslide_id\tsubtype\tfold_0\tfold_1\n"
PATHO += "p0\ts0\t0\ttrain\ttest\np0\ts1\t0\ttrain\ttest\np1\ts2\t1\ttest\ttrain\n"


def test_patho_bench_from_its_folder(tmp_path):
    file(tmp_path, PATHO, "tcga/subtype/k=all.tsv")
    file(tmp_path, CONFIG, "tcga/subtype/config.yaml")
    folder = tmp_path / "tcga" / "subtype"
    task = read_task(folder)
    assert (task.format, task.target, task.level) == ("patho-bench", ClassTarget("subtype"), "patient")
    cohort = read_labels(folder)
    assert {column for slide in cohort for column in slide.labels} == {"subtype"}
    units = make_units(cohort, task.target, level=task.level, label_map=task.label_map)
    assert (units.names, units.slides) == (("p0", "p1"), (("s0", "s1"), ("s2",)))
    assert units.outcome.classes == ("IDC", "ILC")
    assert detect_format(folder) == detect_format(folder / "k=all.tsv") == "patho-bench"


def test_patho_bench_survival_has_events_and_days(tmp_path):
    text = "case_id\tslide_id\tOS\tOS_event\tOS_days\tfold_0\np0\ts0\t0\t1\t100\ttrain\np1\ts1\t3\t0\t2000\ttest\n"
    file(tmp_path, text, "k=all.tsv")
    file(tmp_path, "task_col: OS\nsample_col: slide_id\nextra_cols: [OS_event, OS_days]\n", "config.yaml")
    task = read_task(tmp_path)
    assert (task.target, task.level) == (SurvivalTarget("OS_days", event="OS_event", unit="days"), "slide")
    units = make_units(read_labels(tmp_path), task.target)
    assert units.outcome.time.tolist() == [100, 2000]
    assert units.outcome.event.tolist() == [True, False]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("task_col: other\n", "task_col is 'other', which is no column"),
        ("- a\n", "task_col is ''"),
        ("a: [", "is no YAML"),
    ],
)
def test_patho_bench_s_config_must_fit(tmp_path, config, message):
    file(tmp_path, PATHO, "k=all.tsv")
    with pytest.raises(CohortError, match="cannot read the table"):
        read_task(tmp_path)
    file(tmp_path, config, "config.yaml")
    with pytest.raises(CohortError, match=message):
        read_task(tmp_path)


def test_stamp_s_two_tables(tmp_path, caplog):
    clini = file(tmp_path, "PATIENT,isMSIH\np0,yes\np1,no\np2,yes\n", "clini.csv")
    slide = file(tmp_path, "FILENAME,PATIENT\na/s0.h5,p0\ns1.h5,p0\ns2.h5,p1\ns9.h5,p9\n", "slide.csv")
    with caplog.at_level(logging.WARNING, "gigatome"):
        cohort = read_labels(clini, slides=slide)
    assert [(s.name, s.patient, dict(s.labels)) for s in cohort] == [
        ("s0", "p0", {"isMSIH": "yes"}), ("s1", "p0", {"isMSIH": "yes"}), ("s2", "p1", {"isMSIH": "no"}),
    ]  # fmt: skip
    assert "1 without a row in" in caplog.text
    with pytest.raises(CohortError, match=r"no column names the slides.*STAMP's table of slides beside it"):
        read_labels(clini)
    with pytest.raises(CohortError, match="none of its patients is in"):
        read_labels(clini, slides=file(tmp_path, "FILENAME,PATIENT\ns.h5,q\n", "other.csv"))
    with pytest.raises(CohortError, match=r"other.csv: needs the column PATIENT"):
        read_labels(clini, slides=file(tmp_path, "FILE,PATIENT\ns.h5,q\n", "other.csv"))


def test_stamp_s_xlsx(tmp_path):
    clini = file(tmp_path, workbook([["PATIENT", "days", "grade"], ["p0", 12, None], ["p1", 3.5, "G2"]]), "clini.xlsx")
    slide = file(tmp_path, workbook([["PATIENT", "FILENAME"], ["p0", "s0.h5"], ["p1", "s1.h5"]]), "slide.xlsx")
    cohort = read_labels(clini, slides=slide)
    assert [(s.name, dict(s.labels)) for s in cohort] == [
        ("s0", {"days": "12", "grade": ""}),
        ("s1", {"days": "3.5", "grade": "G2"}),
    ]
    with pytest.raises(CohortError, match="is no XLSX table"):
        read_table(file(tmp_path, "a,b\n1,2\n", "text.xlsx"))


def test_xlsx_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingExtraError, match=r"or save it as CSV: pip install 'gigatome\[tables\]'"):
        read_table(file(tmp_path, "x", "clini.xlsx"))


def given(*names):
    return Cohort(tuple(CohortSlide(f"/data/{n}.svs", n, p, 0.25, {"stain": "HE"}) for n, p in names), "slides")


def test_labels_of_slides_at_hand(tmp_path, caplog):
    cohort = given((A, "TCGA-A2-A1FZ"), ("other", "other"))
    with caplog.at_level(logging.WARNING, "gigatome"):
        joined = read_labels(file(tmp_path, HIPT), cohort)
    assert [(s.uri, s.mpp, dict(s.labels)) for s in joined] == [
        (f"/data/{A}.svs", 0.25, {"stain": "HE", "oncotree_code": "IDC"}),
        ("/data/other.svs", 0.25, {"stain": "HE"}),
    ]
    assert "1 of its 2 slides are not in the cohort" in caplog.text


def test_labels_of_patients_at_hand(tmp_path):
    cohort = given(("s1", "p0"), ("s2", "p0"), ("s3", "p1"))
    for text in ("PATIENT,grade\np0,1\np1,2\n", "case_id,slide_id,grade\np0,x1,1\np0,x2,1\np1,x3,2\n"):
        joined = read_labels(file(tmp_path, text), cohort)
        assert [(s.name, s.labels["grade"]) for s in joined] == [("s1", "1"), ("s2", "1"), ("s3", "2")]


def test_a_table_may_say_whose_a_slide_is(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "gigatome"):
        joined = read_labels(file(tmp_path, CLAM), given(("slide_9", "slide_9"), ("slide_10", "kept")))
    assert (
        "patients of 1 slides are the cohort's, such as of slide_10 (patient_9, and kept in the cohort)" in caplog.text
    )
    assert [(s.name, s.patient) for s in joined] == [("slide_9", "patient_9"), ("slide_10", "kept")]


def test_rows_of_a_slide_that_differ_are_kept_for_the_target_to_judge(tmp_path):
    text = "slide_id,label,note\ns1,a,x\ns1,a,y\ns1,a,y\ns2,b,z\n"
    for cohort in (None, given(("s1", "s1"), ("s2", "s2"))):
        joined = read_labels(file(tmp_path, text), cohort)
        assert [s.name for s in joined] == ["s1", "s1", "s2"]
        assert make_units(joined, ClassTarget("label")).outcome.y.tolist() == [0, 1]


def test_a_table_that_fits_no_slide_says_what_both_hold(tmp_path):
    with pytest.raises(CohortError, match="the table holds slide_0 of patient_0, the cohort s of p"):
        read_labels(file(tmp_path, CLAM), given(("s", "p")))


def test_separators_marks_and_white_space(tmp_path):
    for text in (
        b"\xef\xbb\xbfslide_id;label\r\n s1 ; a b \r\n\r\n",
        b"slide_id\tlabel\ns1\ta b\n\t\n",
        b'slide_id,label\ns1,"a b"\n,\n',
    ):
        table = read_table(file(tmp_path, text))
        assert table.header == ("slide_id", "label")
        assert table.rows == ({"slide_id": "s1", "label": "a b"},)


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", "a.csv", "the table is empty"),
        (b"slide_id,label\n", "a.csv", "the table is empty"),
        (b"a,b,a\n1,2,3\n", "a.csv", "the column 'a' stands there twice"),
        (b"a,b\n1,2,3\n", "a.csv", "row 2: has 3 cells, the header 2"),
        (b'a,b\n"1,2\n', "a.csv", "is no valid CSV"),
        (b"a\n\xff\xfe\n", "a.csv", "is no UTF-8 text"),
        (b"slide_id,label\ns,a\n,b\n", "a.csv", "row 3: the column slide_id is empty"),
        (b"grade\n1\n", "a.csv", "no column names the slides; it has grade"),
        (b"PK", "a.csv.zip", "the archive cannot be read"),
        (zipped(("a.csv", "x"), ("b.csv", "x")), "a.zip", r"must hold one table, and holds a.csv, b.csv"),
        (zipped(("readme.md", "x")), "a.zip", "must hold one table, and holds none"),
    ],
)
def test_tables_that_do_not_do(tmp_path, data, name, message):
    with pytest.raises(CohortError, match=message):
        read_labels(file(tmp_path, data, name))


def test_an_archive_that_would_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gigatome.evaluation.tables._MOST", 100)
    with pytest.raises(CohortError, match=r"a.csv has 1000 bytes, too many for a table"):
        read_table(file(tmp_path, zipped(("a.csv", "x" * 1000)), "a.zip"))


def test_a_folder_without_a_task(tmp_path):
    with pytest.raises(CohortError, match=r"a folder without Patho-Bench's k=all.tsv"):
        read_labels(tmp_path)
    with pytest.raises(CohortError, match="cannot read the table"):
        read_labels(tmp_path / "none.csv")
