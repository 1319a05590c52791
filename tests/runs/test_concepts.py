"""`saejax concepts`: the real command on tiny runs of two sizes and a user's list."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest

from saejax.cli.main import main
from tests import tiny_experiment as tiny
from tests.processes import environment, free_port

WHOLE = "--tokens=100000"  # more than the text has


@pytest.fixture(scope="module")
def sweep(finished, model_and_text, tmp_path_factory):
    """A sweep of two sizes on the store of the finished run."""
    folder = tmp_path_factory.mktemp("sizes")
    config = tiny.write_config(folder / "config.py", *model_and_text, folder / "sweep",
                               f"c.sweep.product = ('sae.d_sae=64,128',)\nc.harvest.store = {str(finished[1] / 'store')!r}\n"
                               "c.train.tokens = 1024")
    assert main(["train", f"--config={config}"]) == 0
    return folder / "sweep"


@pytest.fixture(scope="module")
def runs(finished, sweep):
    """Two runs on one store, of 64 and 128 features; only the first is evaluated."""
    return str(finished[1]), str(sweep / "d_sae=128")


@pytest.fixture(scope="module")
def words(model_and_text):
    """Words of the text, by how often they stand in it."""
    text = " ".join(file.read_text() for file in sorted(model_and_text[1].glob("*.txt"))).replace(".", " ").split()
    return sorted({word for word in text if len(word) == 2}, key=lambda word: (-text.count(word), word))


@pytest.fixture(scope="module")
def listed(words, tmp_path_factory):
    """A user's list: words of the text, and one that it lacks."""
    file = tmp_path_factory.mktemp("lists") / "<b>pairs.txt"
    file.write_text("\n".join([*words[:60], "zzzzzzzzz"]))
    return file


@pytest.fixture(scope="module")
def study(runs, listed, tmp_path_factory):
    """The folder of a study of both runs."""
    out = tmp_path_factory.mktemp("study")
    assert main(["concepts", *runs, f"--out={out}", f"--list={listed}", "--random=64", WHOLE]) == 0
    return out


def test_files(study, words, runs):
    lines = list(csv.DictReader((study / "concepts.csv").open()))
    assert [line["size"] for line in lines] == ["tiny"] * 61 + ["tiny d_sae=128"] * 61
    assert {line["name"] for line in lines} == {*words[:60], "zzzzzzzzz"}
    assert all(int(line["count"]) <= int(line["sampled"]) for line in lines)  # of the same contexts, all of which are looked at
    assert sum(int(line["count"]) for line in lines[:61]) > 20
    assert any(line["feature"] for line in lines) and lines[60]["count"] == "0" and lines[60]["present"] == ""
    values = json.loads((study / "concepts.json").read_text())
    evaluation = json.loads((tiny.Path(runs[0]) / "eval.json").read_text())["entries"][-1]["result"]
    assert values["dead"] == [
        {"label": "tiny", "features": 64, "dead_fraction": evaluation["dead_fraction"], "tokens": evaluation["tokens"]},
        {"label": "tiny d_sae=128", "features": 128, "dead_fraction": None, "tokens": None}]
    assert [one["label"] for one in values["curves"]["sizes"]] == ["tiny", "tiny d_sae=128"]
    for name in ("frequency", "frequency_x_alive", "dead"):
        assert (study / f"{name}.svg").read_bytes()[:5] == b"<?xml" and (study / f"{name}.png").read_bytes()[1:4] == b"PNG"


def test_page(study):
    page = (study / "concepts.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;pairs" in page and "<script" not in page
    assert "1 / alive features" in page and "and 64 drawn from all" in page
    assert re.search("The text does not have: [^<]*zzzzzzzzz[.] Left", page)
    assert "fewer than 20 concepts" in page
    assert re.search(r"d_sae=128</td>\s*<td class=\"text\">128</td><td class=\"text\">not evaluated", page)
    assert all(f">{share}</td>" in page for share in ("2%", "35%", "65%")) and "33,554,432" in page


def test_a_second_call_measures_nothing(study, runs, listed, tmp_path, capsys):
    """It shows what is kept, also where that was changed; another criterion is measured."""
    out = shutil.copytree(study, tmp_path / "study")
    for file in (out / "measured").iterdir():
        values = json.loads(file.read_text())
        values["result"]["found"]["sampled_C"][0] = 123_456
        file.write_text(json.dumps(values))
    counts = json.loads((out / "counts.json").read_text())
    counts["result"]["occurrences"][1] = 4321
    (out / "counts.json").write_text(json.dumps(counts))
    command = ["concepts", *runs, f"--out={out}", f"--list={listed}", "--random=64", WHOLE]
    assert main(command) == 0
    assert capsys.readouterr().err.count("kept in") == 2
    lines = list(csv.DictReader((out / "concepts.csv").open()))
    assert lines[0]["sampled"] == lines[61]["sampled"] == "123456" and lines[1]["count"] == "4321"
    assert main([*command, "--recall=0.1", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("looking for features of 61 concepts") == 2 and len(list((out / "measured").iterdir())) == 4
    assert json.loads(said.out)["absent"][-1] == "zzzzzzzzz"
    (out / "counts.json").write_text("[]")
    assert main(command) == 2
    assert "counts.json: not what this saejax keeps of a study" in capsys.readouterr().err


def test_a_sweep_nouns_and_one_word(runs, sweep, words, tmp_path, capsys):
    nouns, one = tmp_path / "nouns.txt", tmp_path / "one.txt"
    nouns.write_text("\n".join(words))
    one.write_text(words[0])
    capsys.readouterr()
    assert main(["concepts", str(sweep), f"--out={tmp_path / 'out'}", f"--list={one}", f"--nouns={nouns}",
                 "--pick=7", "--between=1e-5,1e-1", "--json", WHOLE]) == 0
    assert [size["label"] for size in json.loads(capsys.readouterr().out)["sizes"]] == ["tiny d_sae=64", "tiny d_sae=128"]
    lines = list(csv.DictReader((tmp_path / "out" / "concepts.csv").open()))
    assert [line["category"] for line in lines] == (["one"] + ["nouns"] * 7) * 2
    assert len({line["name"] for line in lines}) == 8 and all(int(line["count"]) > 0 for line in lines)
    assert main(["concepts", runs[0], f"--out={tmp_path / 'one'}", f"--list={one}", WHOLE]) == 0
    said = capsys.readouterr().out
    assert "Looked at: all 128 contexts." in (tmp_path / "one" / "concepts.html").read_text()
    assert "all 1 concepts are" in said and "0 of 1 sizes have a curve" in said


def test_mistakes_are_one_line(runs, listed, finished, model_and_text, tmp_path, capsys):
    other = tmp_path / "text"
    shutil.copytree(model_and_text[1], other)
    (other / "more.txt").write_text("one more file.")
    config = tiny.write_config(tmp_path / "config.py", model_and_text[0], other, tmp_path / "other",
                               "c.harvest.hookpoints = c.sae.hookpoint, = ('blocks.0.hook_resid_post',)\n"
                               "c.train.tokens = 1024")
    assert main(["harvest", f"--config={config}"]) == 0 and main(["train", f"--config={config}"]) == 0
    none = tmp_path / "none.txt"
    none.write_text("xylophonists\n")
    out, rest = f"--out={tmp_path / 'out'}", [f"--list={listed}"]
    capsys.readouterr()
    for arguments, message in (
            ([runs[0], str(tmp_path / "other"), out, *rest],
             rf"{runs[0]} and \S+/other differ in sae.hookpoint \({tiny.HOOKPOINT}, blocks.0.hook_resid_post\), "
             rf"text.source \({model_and_text[1]}, {other}\); give runs"),
            ([f"{runs[0]}/release", out, *rest], "release: is no run; concepts are counted"),
            ([runs[0], out, "--list=nowhere.txt"], "nowhere.txt: not readable as a list"),
            ([runs[0], out, "--list=stones"], "no list of concepts 'stones'; choose one of animals"),
            ([runs[0], out, f"--list={none}"], "of the text have none of the 1 concepts between two blanks"),
            ([runs[0], out, f"--nouns={listed}", "--pick=1000"], "are wanted; give more candidates"),
            ([runs[0], out, *rest, "--pick=3"], "--pick has no effect without --nouns"),
            ([runs[0], *rest], "give --out=DIR")):
        assert main(["concepts", *arguments]) == 2, message
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1, said


def test_without_a_store_the_language_model_reads_the_text(finished, listed, tmp_path, capsys):
    run = shutil.copytree(finished[1], tmp_path / "run", ignore=shutil.ignore_patterns("store"))
    assert main(["concepts", str(run), f"--out={tmp_path / 'out'}", f"--list={listed}", "--random=8", "--per-concept=2"]) == 0
    values = json.loads((tmp_path / "out" / "concepts.json").read_text())
    sampled = [line["sampled"] for line in values["concepts"]]
    assert values["how"]["contexts"] is None and max(sampled) > 0 and values["curves"]["sizes"][0]["alive"] <= 64


@pytest.mark.slow
def test_two_processes_find_what_one_does(study, runs, listed, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "saejax", "concepts", *runs, f"--out={tmp_path}", f"--list={listed}", "--random=64", WHOLE,
               "--distributed", "--num-processes=2", f"--coordinator=127.0.0.1:{port}"]
    jobs = [subprocess.Popen([*command, f"--process-id={i}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=environment(2)) for i in range(2)]
    said = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "page" in said[0][0] and "page" not in said[1][0]
    one, two = (list(csv.DictReader((folder / "concepts.csv").open())) for folder in (study, tmp_path))
    assert len(one) == len(two) == 122
    shares = ("precision", "recall", "f1")
    for a, b in zip(one, two, strict=True):
        assert [float(b[name] or 0) for name in shares] == pytest.approx([float(a[name] or 0) for name in shares])
        assert {**b, **dict.fromkeys(shares)} == {**a, **dict.fromkeys(shares)}
