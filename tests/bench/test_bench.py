"""`saejax bench` at tiny sizes: what it prints, the page that it writes, what is refused. No time is judged."""

import json

import pytest

from saejax.bench.options import figure
from saejax.bench.run import BEGIN, END
from saejax.cli.main import main
from tests import tiny_experiment as tiny

TINY = ["--d_in=8", "--d_sae=64", "--batch=8", "--k=2", "--steps=2", "--repeats=2"]
READER = [*TINY, "--megabytes=1"]


def test_a_page_and_its_figures(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nbehind\n")
    assert main(["bench", "--only=step,reader", "--kind=topk", "--threads=1", *READER, f"--out={page}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in found["results"]["step"]["figures"]] == ["topk, dense", "topk, sparse"]
    assert [row["unit"] for row in found["results"]["reader"]["figures"]] == ["MB/s"] * 4
    for result in found["results"].values():
        assert result["peak_bytes"] > 50e6
        for row in result["figures"]:
            assert 0 < row["low"] <= row["median"] <= row["high"] and row["repeats"] == 2
    assert found["machine"]["processors"] == 1 and found["options"]["d_sae"] == 64
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("behind\n") and "stale" not in text
    command = f"saejax bench --only=step,reader --kind=topk {' '.join(READER)} --threads=1 --out={page}"
    assert command in text and "| topk, sparse |" in text


@pytest.mark.slow
def test_devices_and_harvest(model_and_text, capsys):
    arguments = ["--only=selection,devices,harvest", "--kind=relu", "--devices=2", *TINY, "--tokens=4096"]
    arguments += [f"--model={model_and_text[0]}", f"--source={model_and_text[1]}", f"--hookpoint={tiny.HOOKPOINT}"]
    assert main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert "| batchtopk |" in out and "| relu, 2 devices |" in out and "1 device" not in out
    assert "tokens/s" in out and "share the processors" in out


def test_quartiles():
    row = figure("a", "b", [4.0, 1.0, 3.0, 2.0, 5.0], ms=1.0)
    assert (row["median"], row["low"], row["high"], row["ms"]) == (3.0, 2.0, 4.0, 1.0)
    assert figure("a", "b", [7.0])["high"] == 7.0


@pytest.mark.parametrize("arguments, message", [
    (["--only=steps"], "there is no 'steps'; did you mean 'step'?"), (["--kind=topk,x"], "there is no 'x'; choose of relu"),
    (["runs/demo"], "takes no path"), (["--threads=100000"], "can be held on"), (["--repeats=0"], "repeats"),
    (["--devices=2,0"], "expected numbers of devices"),
    (["--out=PAGE"], "has no part between '<!-- saejax bench: begin -->'")])
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "page.md").write_text("# Written by hand\n")
    assert main(["bench", *(a.replace("PAGE", str(tmp_path / "page.md")) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err
    assert (tmp_path / "page.md").read_text() == "# Written by hand\n"
