"""Cohorts from every kind of source, the columns other tools write, and everything that can be wrong with a table."""

import logging
from pathlib import Path

import pytest

from gigatome.blob.store import open_blob
from gigatome.core.errors import CohortError
from gigatome.slides.cohort import Cohort, CohortSlide


def table(folder: Path, text: str, name: str = "cohort.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder / "slides"


def test_a_table(tmp_path):
    cohort = Cohort.read(
        table(
            tmp_path,
            "slide,patient,subtype,mpp\na/x.svs,p1,solid,0.25\n/abs/y.ome.tif,p1,,\ns3://b/z.v2.tif,p2,glandular,1\n",
        )
    )
    assert [slide.name for slide in cohort] == ["x", "y", "z.v2"]
    assert [slide.uri for slide in cohort] == [str(tmp_path / "a/x.svs"), "/abs/y.ome.tif", "s3://b/z.v2.tif"]
    assert [slide.patient for slide in cohort] == ["p1", "p1", "p2"]
    assert [slide.mpp for slide in cohort] == [0.25, None, 1.0]
    assert cohort.column("subtype") == {"x": "solid", "z.v2": "glandular"}
    assert cohort.slides[0].labels == {"subtype": "solid"}
    assert len(cohort) == 3
    assert Cohort.read(cohort) is cohort


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("wsi,mpp", "x.svs,0.5"),  # TRIDENT
        ("sample_id,image_path,mask_path,spacing_at_level_0,patient_id", "s1,x.svs,m.tif,0.5,p"),  # hs2p
        ("case_id,slide_id,spacing_at_level_0", "p,x.svs,0.5"),  # CLAM, Patho-Bench
        ("PATIENT,FILENAME,MPP", "p,x.svs,0.5"),  # STAMP
        ("ID,mpp", "x.svs,0.5"),
        ("Slide,Patient,mpp", "x.svs,p,0.5"),
        ("id,slide,mpp", "7,x.svs,0.5"),
        ("slide_id,wsi,mpp", "x,x.svs,0.5"),
    ],
)
def test_columns_of_other_tools(tmp_path, header, row):
    (slide,) = Cohort.read(table(tmp_path, f"{header}\n{row}\n"))
    assert (slide.uri, slide.name, slide.mpp) == (str(tmp_path / "x.svs"), "x", 0.5)
    assert slide.patient == ("x" if "atient" not in header.lower() and "case" not in header else "p")


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_delimiters_marks_and_blank_lines(tmp_path, delimiter):
    text = "\ufeff" + "\r\n".join(["slide,patient,note", 'x.svs, p ,"fine"', "", "y.svs,q,"]).replace(",", delimiter)
    cohort = Cohort.read(table(tmp_path, text, "cohort.tsv" if delimiter == "\t" else "cohort.csv"))
    assert [(slide.name, slide.patient) for slide in cohort] == [("x", "p"), ("y", "q")]
    assert cohort.column("note") == {"x": "fine"}


def test_folder_glob_and_single_slide(tmp_path):
    folder = folder_of(tmp_path, "b.svs", "deep/a.tiff", "notes.txt", ".hidden.svs")
    assert [slide.name for slide in Cohort.read(folder)] == ["b", "a"]
    assert [slide.name for slide in Cohort.read(f"{folder}/**/*.tif*")] == ["a"]
    assert [slide.name for slide in Cohort.read(folder / "b.svs")] == ["b"]
    assert Cohort.read("https://host/x.svs?token=secret").slides[0].name == "x"
    assert "secret" not in Cohort.read("https://host/x.svs?token=secret").source


def test_a_table_in_a_bucket(tmp_path, monkeypatch):
    local = table(tmp_path, "slide\nslides/x.svs\nhttps://other/y.svs\n")
    monkeypatch.setattr("gigatome.slides.cohort.open_blob", lambda uri: open_blob(local))
    cohort = Cohort.read("s3://bucket/study/cohort.csv")
    assert [slide.uri for slide in cohort] == ["s3://bucket/study/slides/x.svs", "https://other/y.svs"]


def test_patients_without_a_column(tmp_path, caplog):
    names = ["TCGA-3C-AALI-01Z-00-DX1.F6E9.svs", "TCGA-3C-AALI-01Z-00-DX2.svs", "other.svs", "TCGA-3C-AALIX.svs"]
    with caplog.at_level(logging.INFO, logger="gigatome"):
        cohort = Cohort.read(folder_of(tmp_path, *names))
    by_name = {slide.name: slide.patient for slide in cohort}
    assert by_name["TCGA-3C-AALI-01Z-00-DX1.F6E9"] == by_name["TCGA-3C-AALI-01Z-00-DX2"] == "TCGA-3C-AALI"
    assert by_name["other"] == "other"
    assert by_name["TCGA-3C-AALIX"] == "TCGA-3C-AALIX"
    assert "2 slides get theirs from the TCGA barcode" in caplog.text


@pytest.mark.parametrize(
    "cell", ["TCGA-3C-AALI-01Z.F6E9", "TCGA-3C-AALI-01Z.F6E9.svs", "any/where/TCGA-3C-AALI-01Z.F6E9.h5"]
)
def test_labels_by_slide(tmp_path, cell):
    folder = folder_of(tmp_path, "TCGA-3C-AALI-01Z.F6E9.svs", "b.svs")
    cohort = Cohort.read(folder, labels=table(tmp_path, f"slide_id,case_id,grade,mpp\n{cell},case7,3,0.5\n"))
    assert cohort.column("grade") == {"TCGA-3C-AALI-01Z.F6E9": "3"}
    assert [(slide.patient, slide.mpp) for slide in cohort] == [("case7", 0.5), ("b", None)]


def test_labels_by_patient_and_over_a_table(tmp_path):
    slides = table(tmp_path, "slide,patient,site\nx.svs,p1,A\ny.svs,p1,B\nz.svs,p2,A\n")
    clinical = table(tmp_path, "PATIENT,MSI\np1,high\np2,low\n", "clini.csv")
    cohort = Cohort.read(slides, labels=clinical)
    assert cohort.column("MSI") == {"x": "high", "y": "high", "z": "low"}
    assert cohort.column("site") == {"x": "A", "y": "B", "z": "A"}


def test_labels_that_fit_only_in_part_warn(tmp_path, caplog):
    labels = table(tmp_path, "slide,grade\nb,1\nc,2\nd,3\n")
    with caplog.at_level(logging.WARNING, logger="gigatome"):
        cohort = Cohort.read(folder_of(tmp_path, "a.svs", "b.svs"), labels=labels)
    assert cohort.column("grade") == {"b": "1"}
    assert "2 of 3 rows fit no slide" in caplog.text


def test_rows_that_repeat_are_left_out(tmp_path, caplog):
    cohort = Cohort.read(table(tmp_path, "slide,patient\nx.svs,p\nx.svs,p\n"))
    assert len(cohort) == 1
    assert "1 rows repeat another" in caplog.text


def test_select(tmp_path):
    cohort = Cohort.read(table(tmp_path, "slide\nx.svs\ny.svs\nz.svs\n"))
    assert [slide.name for slide in cohort.select(["z", "x"])] == ["x", "z"]
    with pytest.raises(CohortError, match="no slide w"):
        cohort.select(["x", "w"])


def test_a_column_that_is_not_there(tmp_path):
    cohort = Cohort.read(table(tmp_path, "slide,subtype,grade\nx.svs,a,1\n"))
    with pytest.raises(CohortError, match=r"'subtyp'; did you mean subtype\? \(label columns: subtype, grade\)"):
        cohort.column("subtyp")
    with pytest.raises(CohortError, match="no label column at all"):
        Cohort((CohortSlide("x.svs", "x", "x"),)).column("subtype")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table is empty"),
        ("slide,patient\n", "cohort is empty"),
        ("picture,patient\nx.svs,p\n", "it has picture, patient, and one of slide, wsi"),
        ("slide,slide\nx.svs,y.svs\n", "'slide' stands there twice"),
        ("slide,mpp\nx.svs,0.5\ny.svs,abc\n", "line 3: mpp must be a positive number, not 'abc'"),
        ("slide,mpp\nx.svs,0\n", "line 2: mpp must be a positive number"),
        ("slide,mpp\nx.svs,-1\n", "must be a positive number"),
        ("slide,mpp\nx.svs,inf\n", "must be a positive number"),
        ("slide,mpp\nx.svs,nan\n", "must be a positive number"),
        ("slide,patient\n,p\n", "line 2: the column slide is empty"),
        ("slide,patient\nx.svs,p,extra\n", "line 2: has 3 cells, the header 2"),
        ("slide,patient\nx.svs,p\nx.svs,q\n", "slide x has two patients, p and q"),
        ("slide,grade\nx.svs,1\nx.svs,2\n", "slide x has two rows that differ"),
        ("slide\na/x.svs\nb/x.tif\n", "two slides are named x: .*a/x.svs and .*b/x.tif"),
        ("slide,grade\ncase_17,1\n", "case_17 is not the path of a slide.*as its labels"),
        ('slide,note\nx.svs,"open\n', "no valid CSV"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    with pytest.raises(CohortError, match=message):
        Cohort.read(table(tmp_path, text))


def test_a_table_that_is_no_text(tmp_path):
    path = tmp_path / "cohort.csv"
    path.write_bytes("slide\nGröße.svs\n".encode("latin-1"))
    with pytest.raises(CohortError, match="UTF-8"):
        Cohort.read(path)


@pytest.mark.parametrize("source", ["none.csv", "none.svs", "none", "none/*.svs"])
def test_sources_that_are_not_there(tmp_path, source):
    with pytest.raises(CohortError, match=r"none"):
        Cohort.read(tmp_path / source)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CohortError, match=r"the cohort is empty; no slide there \(\.svs"):
        Cohort.read(tmp_path)


def test_two_slides_of_one_name(tmp_path):
    folder = folder_of(tmp_path, "a/x.svs", "b/x.svs")
    with pytest.raises(CohortError, match="two slides are named x"):
        Cohort.read(folder)
    assert len(Cohort.read(folder, allow_duplicates=True)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,grade\nq,1\n", "no row fits a slide of .*holds 'q' and the like, the cohort has slide 'a'"),
        ("PATIENT,grade\nq,1\n", "no row fits .*patient 'a'"),
        ("picture,grade\na,1\n", "no column names slides or patients"),
        ("slide,grade\na,1\na,2\n", r"line 3: a stands there twice and differs \(line 2\)"),
        ("slide,mpp\na,many\n", "line 2: mpp must be a positive number"),
    ],
)
def test_labels_that_are_wrong(tmp_path, text, message):
    with pytest.raises(CohortError, match=message):
        Cohort.read(folder_of(tmp_path, "a.svs"), labels=table(tmp_path, text))


def test_labels_that_contradict_the_table(tmp_path):
    slides = table(tmp_path, "slide,patient\nx.svs,p1\n")
    labels = table(tmp_path, "slide,patient\nx,p2\n", "labels.csv")
    with pytest.raises(CohortError, match="two patients, p1 and p2"):
        Cohort.read(slides, labels=labels)


def test_the_developers_tables(shared_data):
    cohort = Cohort.read(shared_data / "regions.csv")
    assert len(cohort) == 16
    assert len(set(cohort.column("organ").values())) == 6
    assert cohort.slides[0].mpp == 0.68
    with cohort.slides[0].open() as slide:
        assert slide.mpp == 0.68
    assert len(Cohort.read(shared_data / "whole.csv")) == 2
