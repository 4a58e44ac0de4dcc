"""The Python example of the README runs as it stands."""

import re
from pathlib import Path

from gigatome.slides.synthetic import SyntheticOptions, make_cohort

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(code.splitlines()) <= 20
    options = SyntheticOptions(width=1024, height=1024)
    make_cohort(tmp_path / "cohort", patients=4, slides_per_patient=1, options=options)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "AUROC" in capsys.readouterr().out
    assert (tmp_path / "maps" / "P001-1.png").is_file()
    assert len(list((tmp_path / "job").glob("5x_96px_0px_overlap/features_*/*.h5"))) == 4


def test_the_two_commands_come_first():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert [line.split()[:2] for line in lines[3:5]] == [["make", "demo"], ["make", "test"]]
