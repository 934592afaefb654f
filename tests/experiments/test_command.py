"""The command line: one clear line for every mistake, and what a right one writes."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_studies import SOURCE, FakeFit, make_study

from experiments import check_matching, overrides, record, report, study, tables
from experiments import execute as executing
from experiments.run import main
from experiments.study import Arm, lower
from moejax.core.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder of studies with one toy in it, a ledger and a runs folder; training is made up. Gives the trainer."""
    (tmp_path / "studies" / "family").mkdir(parents=True)
    (tmp_path / "studies" / "family" / "toy.py").write_text(SOURCE.format(slug="toy"))
    monkeypatch.setattr(study, "ROOT", tmp_path / "studies")
    monkeypatch.setattr(record, "LEDGER", tmp_path / "ledger")
    monkeypatch.setenv("MOEJAX_RUNS", str(tmp_path / "runs"))
    fit = FakeFit()
    monkeypatch.setattr(executing, "_prepared_fit", lambda *args: fit)
    monkeypatch.setattr(executing, "_ask_canary", lambda *args: None)
    return fit


WRONG = {
    "unknown study": (["--study=tooy"], r"unknown study 'tooy' .*did you mean 'toy'"),
    "unknown preset": (["--study=toy", "--preset=cup"], r"unknown preset 'cup' of study 'toy'; did you mean 'cpu'"),
    "unknown ablation": (["--study=toy", "--ablation=capacty"], r"unknown ablation 'capacty' .*did you mean 'capacity'"),
    "unknown arm": (["--study=toy", "--arms=dense,swich"], r"unknown arm 'swich' .*did you mean 'switch'"),
    "an ablation's arm": (
        ["--study=toy", "--arms=roomy"],
        r"arm 'roomy' belongs to ablation 'capacity' .*add --ablation=capacity",
    ),
    "seeds in words": (["--study=toy", "--seeds=three"], r"--seeds: invalid int value: 'three'"),
    "no seeds": (["--study=toy", "--seeds=0"], r"--seeds=0 is not a number of runs"),
    "no jobs": (["--study=toy", "--jobs=0"], r"--jobs=0 is not a number of runs side by side; give 1 or more"),
    "jobs and devices": (["--study=toy", "--jobs=2", "--devices=8"], r"--jobs=2 does not go with --devices=8"),
    "jobs where a run has all devices": (
        ["--study=toy", "--jobs=2"],
        r"--jobs=2 .* since each run has all devices of this process",
    ),
    "jobs of a list": (["--list", "--jobs=2"], r"--jobs=2 does not go with --list"),
    "unknown flag": (["--studdy=toy"], r"unknown argument '--studdy=toy'; did you mean '--study'"),
    "stray word": (["toy"], r"unknown argument 'toy'"),
    "unknown key": (["--study=toy", "--config.train.step=3"], r"unknown key 'step' in config\.train .*did you mean 'steps'"),
    "wrong type": (["--study=toy", "--config.train.steps=many"], r"train\.steps='many' in the command line is not an int"),
    "no value": (["--study=toy", "--config.train.steps"], r"'--config\.train\.steps' has no value; write"),
    "list and report": (["--list", "--report"], r"--list does not go with --report"),
    "family without list": (["--study=toy", "--family=soft"], r"--family=soft does not go with --study; it belongs to --list"),
    "arms of a config": (["--config=x.py", "--arms=a"], r"--arms=a does not go with --config"),
    "study and config": (["--config=x.py", "--study=toy"], r"--study=toy does not go with --config"),
    "workdir of a study": (["--study=toy", "--workdir=x"], r"--workdir=x does not go with --study; it belongs to --config"),
    "unknown family": (["--list", "--family=sofd"], r"unknown family 'sofd'; did you mean 'soft'"),
    "no such config": (
        ["--config=configs/base_ml.py"],
        r"'configs/base_ml\.py' does not exist; did you mean 'configs/base_lm\.py'",
    ),
    "config without get_config": (["--config=configs/__init__.py"], r"defines no get_config\(\)"),
    "key of a config": (
        ["--config=configs/base_lm.py", "--config.data.seqlen=3"],
        r"unknown key 'seqlen' .*did you mean 'seq_len'",
    ),
    "fresh workdir": (["--config=configs/base_lm.py", "--workdir=x", "--fresh"], r"--fresh does not go with --workdir=x"),
    "preset of all reports": (["--report", "--preset=cpu"], r"add --study=NAME to --report"),
}


@pytest.mark.parametrize(("argv", "words"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line_and_status_2(toy, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(REPOSITORY)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{words}.*\n", err)
    assert "Traceback" not in err
    assert out == ""
    assert toy.calls == []


@pytest.mark.parametrize("argv", [["--study=nothing_like_it"], ["--preset=cpu", "--config=configs/base_lm.py"]])
def test_a_mistake_in_a_real_process_is_one_line_and_imports_no_jax(argv):
    code = f"import sys; from experiments.run import main; status = main({argv}); assert 'jax' not in sys.modules; sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_a_wrong_model_spec_is_found_before_anything_is_trained(toy, capsys, tmp_path, monkeypatch):
    monkeypatch.undo()
    config = str(REPOSITORY / "configs" / "base_lm.py")
    assert main([f"--config={config}", f"--runs={tmp_path}", "--config.model.blocks.moe.ffn.select.kk=2"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: unknown key 'kk' in model\.blocks\.moe\.ffn\.select .*did you mean 'k'\?\n", err)


def test_a_study_prints_tables_and_verdicts_and_writes_what_it_says(toy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--study=toy"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"dense\s+4\s+2\.00", out)
    assert re.search(r"★ Switch beats dense at equal compute .*reproduced", out)
    assert "not judged: drops cost quality (needs roomy)" in out
    installed = importlib.util.find_spec("tensorboard") is not None
    assert ("tensorboard --logdir=runs/reports/toy/cpu/tensorboard" in out) == installed  # only what is there is recommended
    for name in ("curves.png", "load.png", "results.json", "report.html"):
        assert f"runs/reports/toy/cpu/{name}" in out
        assert (tmp_path / "runs" / "reports" / "toy" / "cpu" / name).stat().st_size > 500
    assert "runs/ledger/toy.json" in out
    assert json.loads((tmp_path / "runs" / "ledger" / "toy.json").read_text())["slug"] == "toy"
    assert "| toy | Switch beats dense at equal compute |" in (tmp_path / "runs" / "ledger" / "verdicts.md").read_text()
    assert not (tmp_path / "ledger").exists(), "the repository's ledger is written with --record only"
    assert (tmp_path / "runs/reports/toy/cpu/tensorboard/dense-seed2/metrics.jsonl").exists()
    assert len(toy.calls) == 12

    assert main(["--study=toy"]) == 0
    assert re.search(r"dense\s+4 \(4 cached\)", capsys.readouterr().out)
    assert len(toy.calls) == 12


def test_recorded_results_go_into_the_repositorys_ledger(toy, capsys, tmp_path):
    assert main(["--study=toy", "--record"]) == 0
    assert json.loads((tmp_path / "ledger" / "toy.json").read_text())["slug"] == "toy"
    assert not (tmp_path / "runs" / "ledger").exists()


def test_a_run_leaves_the_checkout_as_it_was(toy, tmp_path, monkeypatch):
    """With the real ledger, docs and canary: every file of them before and after."""
    monkeypatch.undo()
    monkeypatch.setenv("MOEJAX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(executing, "_prepared_fit", lambda *args: toy)
    monkeypatch.setattr(executing, "_refuse_unmatched", lambda *args: None)
    monkeypatch.setattr("experiments.canary._losses", lambda *args: [1.0] * 5)
    monkeypatch.setattr("experiments.canary.platform_key", lambda: "a machine that nobody has seen")
    kept = [p for folder in ("docs", "experiments/ledger") for p in (REPOSITORY / folder).glob("*")] + [
        REPOSITORY / "README.md"
    ]
    before = {path: path.read_bytes() for path in kept if path.is_file()}
    assert main(["--study=first_mixture"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(p.name for p in (REPOSITORY / "experiments/ledger").glob("*")) == sorted(
        p.name for p in kept if p.parent.name == "ledger"
    )
    written = sorted(p.name for p in (tmp_path / "runs" / "ledger").iterdir())
    assert written == ["canary.json", "first_mixture.json", "verdicts.md"]


def test_a_smoke_run_leaves_the_ledger_alone(toy, capsys, tmp_path):
    assert main(["--study=toy", "--preset=smoke", "--config.train.steps=2"]) == 0
    out = capsys.readouterr().out
    assert "out of reach at this scale" in out
    assert "no ledger entry: preset 'smoke'" in out
    assert "step 1/2" in out
    assert not (tmp_path / "ledger").exists()


def test_a_smoke_run_that_diverges_fails(toy, capsys, tmp_path, monkeypatch):
    from moejax.train import NonFiniteLoss

    def diverge(*args, **kwargs):
        raise NonFiniteLoss(1, [], None)

    monkeypatch.setattr(executing, "_prepared_fit", lambda *args: diverge)
    assert main(["--study=toy", "--preset=smoke"]) == 1
    assert "diverged: dense seed 0: loss, gradient or parameters are not finite at step 1" in capsys.readouterr().out


def test_one_config_is_trained_and_summed_up(toy, capsys, tmp_path):
    config = str(REPOSITORY / "configs" / "base_lm.py")
    assert main([f"--config={config}", "--config.train.steps=8", "--seeds=2"]) == 0
    out = capsys.readouterr().out
    assert toy.calls == [("base_lm seed 0", 0), ("base_lm seed 1", 1)]
    assert re.search(r"eval/bits_per_byte\s+1\.90", out)
    assert re.search(r"params\s+1\.23M", out)
    assert main([f"--config={config}", f"--workdir={tmp_path / 'here'}"]) == 0
    assert (tmp_path / "here" / "run.json").exists()


def test_an_interruption_is_said_and_finished_arms_stay(toy, capsys, monkeypatch):
    class Interrupted(FakeFit):
        def __call__(self, config, **kwargs):
            if "switch" in kwargs["label"]:
                raise KeyboardInterrupt
            return super().__call__(config, **kwargs)

    monkeypatch.setattr(executing, "_prepared_fit", lambda *args: Interrupted())
    assert main(["--study=toy"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from what is finished\n"
    monkeypatch.setattr(executing, "_prepared_fit", lambda *args: toy)
    main(["--study=toy"])
    assert ("dense seed 0", 0) not in toy.calls
    assert len(toy.calls) == 11


def test_report_rebuilds_from_finished_runs_without_training_or_touching_the_ledger(toy, capsys, tmp_path):
    assert main(["--report"]) == 0
    assert "no finished runs of any study" in capsys.readouterr().out
    main(["--study=toy", "--ablation=capacity"])
    trained = len(toy.calls)
    (tmp_path / "runs" / "reports" / "toy" / "cpu-capacity" / "report.html").unlink()
    before = (tmp_path / "runs" / "ledger" / "toy.capacity.json").read_text()
    assert main(["--report"]) == 0
    assert len(toy.calls) == trained
    assert (tmp_path / "runs" / "reports" / "toy" / "cpu" / "report.html").exists()
    assert (tmp_path / "runs" / "reports" / "toy" / "cpu-capacity" / "report.html").exists()
    assert sorted(p.name for p in (tmp_path / "runs" / "ledger").iterdir()) == ["toy.capacity.json", "verdicts.md"]
    assert not (tmp_path / "ledger").exists()
    assert (tmp_path / "runs" / "ledger" / "toy.capacity.json").read_text() == before
    index = (tmp_path / "runs" / "reports" / "index.html").read_text()
    assert 'href="toy/cpu-capacity/report.html"' in index
    assert "Reports without a ledger entry" in index
    assert 'href="toy/cpu/report.html"' in index


def test_the_report_holds_all_that_a_reader_needs_and_nothing_from_elsewhere(toy, tmp_path):
    runs = tmp_path / "runs"
    made = make_study(title="A <toy> & more", notes="The paper's table 3 is unclear.")
    outcome = executing.execute(made, "cpu", runs=runs, fit=toy)
    text = report.write(outcome, runs).html.read_text()
    assert "A &lt;toy&gt; &amp; more" in text
    assert "https://arxiv.org/abs/2101.03961" in text
    assert tables.spread(tuple(run.value("eval/bits_per_byte") for run in outcome.runs["dense"].values())) in text
    assert "Switch beats dense at equal compute" in text
    assert '<span class="green">reproduced</span>' in text
    assert text.count("data:image/png;base64,") == 2
    assert "model.pattern" in text
    assert "equal FLOPs per token" in text
    assert "table 3 is unclear" in text
    assert "Departures from the paper" in text
    assert "a tenth of the steps" in text
    assert "&quot;slug&quot;: &quot;toy&quot;" in text
    assert not re.findall(r'(?:src|href)="(?!data:|https://arxiv\.org)', text)


def test_differences_are_those_between_the_presets_base_and_the_arm(toy, tmp_path):
    outcome = executing.execute(make_study(), "cpu", runs=tmp_path, seeds=1, fit=toy)
    rows = report.differences(outcome).rows
    assert ("dense", "model.pattern", "('dense', 'moe')", "('dense', 'dense')") in rows
    assert ("top2", "model.blocks.moe.ffn.select.k", "1", "2") in rows
    assert ("switch", "-", "", "as the base") in rows
    assert len(rows) == 3


def test_a_study_with_a_claim_that_cannot_be_judged_is_not_trained(toy, tmp_path, capsys, monkeypatch):
    """But for what the user chose, which writes no entry anyway, and at another preset, whose arms no test looks at: that is told."""
    width = "model.blocks.dense.ffn.hidden"
    monkeypatch.setattr(
        check_matching, "of_config", lambda config, kinds: dict.fromkeys(kinds, float(config.model.blocks.dense.ffn.hidden))
    )
    wide = make_study(arms=(Arm("dense", {width: 300}), *make_study().arms[1:]))
    words = r"'toy' has claims .* at preset 'cpu' .*: Switch beats dense at equal compute: .*FLOPs.*: 300 in 'dense', 256 in 'switch'"
    with pytest.raises(ConfigError, match=words):
        executing.execute(wide, "cpu", runs=tmp_path)
    assert toy.calls == []
    for chosen in ({"seeds": 2}, {"arms": ["dense", "switch"]}, {"overrides": {"train.steps": 50}}):
        outcome = executing.execute(wide, "cpu", runs=tmp_path, **chosen)
        assert "will not be judged: Switch beats dense at equal compute" in " ".join(capsys.readouterr().out.split())
        assert set(outcome.runs) >= {"dense", "switch"}
    executing.execute(wide, "paper", runs=tmp_path)
    assert "will not be judged: Switch beats dense at equal compute" in " ".join(capsys.readouterr().out.split())
    assert executing.execute(make_study(), "cpu", runs=tmp_path / "even").runs


def test_a_claim_that_only_the_papers_scale_can_judge_is_looked_at_there_alone(monkeypatch):
    made = make_study()
    claim = lower("m", "switch", "dense", matched=("params",), needs="a large model")
    configs = {arm: study.resolve(made, "cpu", arm) for arm in made.every_arm}
    monkeypatch.setattr(
        check_matching, "of_config", lambda config, kinds: dict.fromkeys(kinds, float(len(set(config.model.pattern))))
    )
    assert check_matching.unjudgeable([claim], "cpu", configs) == []
    ((found, reason),) = check_matching.unjudgeable([claim], "paper", configs)
    assert found is claim
    assert "2 in 'switch', 1 in 'dense'" in reason


def test_one_study_is_shown_in_detail(toy, capsys):
    assert main(["--list", "--study=toy"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"roomy\s+capacity", out)
    assert re.search(r"cpu\s+4, 6 \(headline 4, 6, 9, 13\)\s+100", out)
    assert "★ Switch beats dense" in out
    assert re.search(r"scale\s+a tenth of the steps\s+train.steps 100 -> 1000", out)


def test_the_list_is_quick_and_complete():
    code = "import sys; from experiments.run import main; main(['--list']); assert 'jax' not in sys.modules"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\S+ .*\b(card|implemented|study)\s*$", done.stdout, re.M)) >= 214
    assert re.search(r"\d+ of 214 methods implemented", done.stdout)
    # 0.4 s alone on a laptop; the bound leaves room for a machine that runs other tests.
    assert seconds < 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config.task.kind=classify"], r"the task Classify reads 'image', .* for these task\.kind='next_token'"),
        (["--config.eval.split=tests"], r"'embedded_text' in data\.name has no split 'tests'"),
        (["--config.data.name=digits"], r"unknown data set 'digits' in data\.name; did you mean 'embedded_digits'"),
        (["--config.data.workers=-1"], r"data\.workers=-1 must be a whole number of at least 0"),
        (["--config.data.wrokers=1"], r"unknown key 'wrokers' in config\.data .*did you mean 'workers'"),
        (["--config.train.accumulation=0"], r"train\.accumulation=0 must be a whole number of at least 1"),
        (["--config.optimizer.learning_rate=-1"], r"optimizer\.learning_rate=-1\.0 must be a number of at least 0"),
        (["--config.model.scan=None"], r"model\.scan=None must be true or false"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_anything_is_read(toy, capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.undo()
    assert main([f"--config={REPOSITORY / 'configs' / 'base_lm.py'}", f"--runs={tmp_path}", *argv]) == 2
    err = capsys.readouterr().err
    assert re.match(rf"error: .*{words}", err)
    assert "(arm " not in err
    assert err.count("\n") == 1


def test_a_corpus_that_is_not_there_is_one_line(capsys, tmp_path):
    argv = [
        f"--config={REPOSITORY / 'configs' / 'base_lm.py'}",
        f"--runs={tmp_path / 'runs'}",
        f"--config.data.data_dir={tmp_path}",
    ]
    assert main([*argv, "--config.data.name=c4", "--config.data.domains=None"]) == 2
    err = capsys.readouterr().err
    assert re.match(r"error: 'c4' in data\.name is not prepared in .*tfds build c4", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "README.md",
            r"'README\.md' is no Python file; did you mean|'README\.md' is no Python file; valid names: configs/base_lm\.py",
        ),
        ("configs", r"'configs' is a folder, and no config; did you mean 'configs/\w+\.py'"),
        ("configs/base_ml.py", r"'configs/base_ml\.py' does not exist; did you mean 'configs/base_lm\.py'"),
    ],
)
def test_what_is_no_config_is_told_with_one_that_is(capsys, monkeypatch, place, words):
    monkeypatch.chdir(REPOSITORY)
    assert main([f"--config={place}"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_config_with_a_slip_in_it_is_one_line(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(:\n    pass\n")
    assert main([f"--config={tmp_path / 'mine.py'}"]) == 2
    assert re.fullmatch(r"error: --config=.*mine\.py: .* in line 1 of '.*mine\.py'\n", capsys.readouterr().err)


def test_a_method_without_a_study_is_known(capsys):
    from experiments import catalog

    slug = next(row.slug for row in catalog.load().values() if not row.study)
    assert main([f"--study={slug}"]) == 2
    assert re.search(rf"'{slug}' \(.*, arXiv .*\) is in the catalogue, but has no study yet", capsys.readouterr().err)


@pytest.mark.parametrize(("steps", "warmup"), [(200, 100), (100, 100), (50, 25), (1, 0)])
def test_a_shortened_run_warms_up_for_as_much_less(steps, warmup):
    from ml_collections import ConfigDict

    config = ConfigDict({"train": {"steps": 200}, "optimizer": {"warmup_steps": 100}})
    found = overrides.shortened(config, {"train.steps": steps})
    assert {"optimizer.warmup_steps": 100, **found} == {"train.steps": steps, "optimizer.warmup_steps": warmup}
    given = {"train.steps": 50, "optimizer.warmup_steps": 3}
    assert overrides.shortened(config, given) == given
