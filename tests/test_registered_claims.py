"""Registered claims: what their file may say, when they count as registered, and the verdicts on them."""

import csv
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpers.runs import run_verb
from helpers.sweeps import small_sweep, write_sweep_file
from mice_jax import report, sweep
from mice_jax.errors import UserError
from mice_jax.report_page import claims_table, content, read_runs
from mice_jax.statistics import registered_claims, verdicts
from mice_jax.statistics.registered_claims import Registration, read
from mice_jax.statistics.verdicts import Result, judge
from mice_jax.sweeps import stored_sweeps
from mice_jax.sweeps.study import Study

pytestmark = pytest.mark.smoke

RATE, BATCH, BASE = "optim.learning_rate", "optim.batch_size", "model.init_from"
AXES = {BATCH: [8, 64], RATE: [1e-3, 2e-3, 4e-3]}
SEEDS = [0, 1, 2, 3, 4]
CLAIM = """
[[claim]]
name = "large batch ends better"
kind = "better"
arms = {"optim.batch_size" = 64}
against = {"optim.batch_size" = 8}
"""
ALIKE = CLAIM.replace("large batch ends better", "batches are alike").replace('"better"', '"alike"\nmargin = 0.05')
BEST = "choose_seeds = [0, 1]\n" + CLAIM + 'best = ["optim.learning_rate"]\n'


def registered(text: str, tmp_path: Path, **fields: Any) -> Registration:
    """Returns the registration of a file with this text, by a sweep over AXES and SEEDS."""
    file = tmp_path / "claims.toml"
    file.write_text(text)
    return read(file, small_sweep(**({"axes": AXES, "seeds": SEEDS} | fields)))


# ---------------------------------------------------------------------------------------- the file
def test_claim_is_read_with_the_sweeps_metric_and_kept_in_json(tmp_path: Path) -> None:
    found = registered(BEST + 'primary = false\nmetric = "eval/chats/token_accuracy"\nmode = "max"\n', tmp_path)
    [claim] = found.claims
    assert (claim.arms, claim.against, claim.best) == ({BATCH: ["64"]}, {BATCH: ["8"]}, [RATE])
    assert (claim.mode, claim.primary, found.level, found.choose_seeds) == ("max", False, 0.05, [0, 1])
    assert found.compared_seeds(claim) == [2, 3, 4]
    assert found.sha256 == registered_claims.hash_of(tmp_path / "claims.toml")
    assert Registration.from_json(json.loads(json.dumps(found.to_json()))) == found
    [claim] = registered(CLAIM, tmp_path).claims
    assert (claim.metric, claim.mode, claim.primary) == ("eval/loss", "min", True)


def test_value_that_toml_cannot_write_is_named_by_its_position(tmp_path: Path) -> None:
    axes = {"optim.frozen": [[], ["lm_head.*"]], "optim.schedule": ["constant", "cosine", "wsd"]}
    text = CLAIM.replace('{"optim.batch_size" = 64}', '{"optim.frozen" = {index = 1}}')
    text = text.replace(
        '{"optim.batch_size" = 8}', '{"optim.frozen" = {index = 0}, "optim.schedule" = ["wsd", "cosine"]}'
    )
    [claim] = registered(text, tmp_path, axes=axes).claims
    assert claim.arms == {"optim.frozen": ["['lm_head.*']"]}
    assert claim.against == {"optim.frozen": ["[]"], "optim.schedule": ["wsd", "cosine"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "claims.toml is not TOML: "),
        ("", "registers no claim"),
        ("levle = 0.1\n" + CLAIM, "claims.toml has the key 'levle', which nothing reads; did you mean 'level'?"),
        ("level = 5\n" + CLAIM, "level=5 must be a number above 0 and at most 0.5"),
        ("choose_seeds = [7]\n" + CLAIM, "choose_seeds=[7] must be a list of seeds of the sweep"),
        (CLAIM + "margn = 0.1\n", "claims.toml line 2: claim 'large batch ends better' has the key 'margn'"),
        (CLAIM + "margin = 0.1\n", "has a margin, which only the kind alike has"),
        (ALIKE.replace("margin = 0.05", ""), "is of the kind alike and has no margin. Give the largest difference of"),
        (ALIKE.replace("0.05", "-1"), "has margin=-1"),
        (CLAIM.replace('"better"', '"worse"'), "kind='worse' is not one of better, alike"),
        (CLAIM.replace("large batch ends better", " "), "has no name"),
        (CLAIM + CLAIM, "two claims named 'large batch ends better'"),
        (CLAIM + "primary = 1\n", "primary=1 must be true or false"),
        (CLAIM + 'metric = "lr"\n', "metric='lr' is neither that of the sweep, eval/loss, nor a held-out one"),
        (CLAIM + 'metric = "eval/macro_loss"\n', "mode='' of the metric eval/macro_loss must be min"),
        (CLAIM.replace("= 64", "= 32"), "no arm of the sweep has that value. The axis has 8, 64"),
        (CLAIM.replace("= 64", "= true"), "no arm of the sweep has that value"),
        (CLAIM.replace("= 64", "= {index = 2}"), "no arm of the sweep has that value"),
        (CLAIM.replace("= 64", "= 8"), "arms and against have arms in common"),
        (CLAIM.replace("batch_size", "batch_sise"), "is not an axis of the sweep; did you mean 'optim.batch_size'"),
        (CLAIM.replace('against = {"optim.batch_size" = 8}', ""), "has no against. Give values of axes"),
        (BEST.replace("choose_seeds = [0, 1]", ""), "and the file has no choose_seeds"),
        (BEST.replace("[0, 1]", "[0, 1, 2]"), "would be compared by 2 seeds, and a comparison needs at least 3"),
        (CLAIM + 'best = ["optim.batch_size"]\n', "names the axis 'optim.batch_size' twice"),
        (CLAIM + 'over = "model.init_fro"\n', "best or over names 'model.init_fro', which is not an axis"),
    ],
)  # fmt: skip
def test_wrong_claim_is_an_error_message(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        registered(text, tmp_path)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_claims_need_a_grid_and_three_repetitions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a random search"):
        registered(CLAIM, tmp_path, search="random", trials=4)
    axes = AXES | {BASE: ["a", "b"]}
    with pytest.raises(UserError, match=r"compared by 2 values of model.init_from"):
        registered(CLAIM + 'over = "model.init_from"\n', tmp_path, axes=axes)
    with pytest.raises(UserError, match=r"no_such.toml of the sweep does not exist"):
        read(tmp_path / "no_such.toml", small_sweep(axes=AXES, seeds=SEEDS))


# ---------------------------------------------------------------------------------------- registration
def test_claims_are_found_beside_the_sweep_unless_it_names_others(tmp_path: Path) -> None:
    file = tmp_path / "sweep.py"
    assert registered_claims.find(file, "") is None
    (tmp_path / "claims.toml").write_text(CLAIM)
    assert registered_claims.find(file, "") == tmp_path / "claims.toml"
    assert registered_claims.find(file, "none") is None
    assert registered_claims.find(file, "other.toml") == tmp_path / "other.toml"


def test_claims_may_change_before_the_first_run_alone(tmp_path: Path) -> None:
    claims, folder = tmp_path / "mine.toml", tmp_path / "out"

    def study(text: str) -> Study:
        claims.write_text(text)
        return Study(small_sweep(axes=AXES, seeds=SEEDS, claims=str(claims) if text else ""), folder)

    def kept() -> dict[str, Any]:
        return json.loads((folder / "sweep.json").read_text())

    study(CLAIM)
    assert kept()["registered_claims"]["claims"][0]["name"] == "large batch ends better"
    second = study(ALIKE)
    assert kept()["registered_claims"]["claims"][0]["name"] == "batches are alike"
    assert kept()["registered_claims"]["sha256"] == registered_claims.hash_of(folder / "claims.toml")
    second.begin(second.claim() or 0)
    for text, words in ((CLAIM, "mine.toml has the hash"), ("", "it is now given none"), (ALIKE + " ", "has the hash")):
        with pytest.raises(UserError, match=words) as e:
            study(text)
        assert "A claim that is written once runs have begun is no claim. Restore the file" in str(e.value)
    before = kept()
    study(ALIKE)
    assert kept() == before, "the same claims continue the sweep, with the time at which they were registered"

    del before["registered_claims"]
    (folder / "sweep.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"registered no claims before its first run, .* Set claims to none"):
        study(ALIKE)


def test_sweep_with_a_wrong_claim_ends_with_2_before_it_begins(tmp_path: Path, capsys: Any) -> None:
    file = write_sweep_file(tmp_path, f"axes={AXES}, seeds={SEEDS}")
    (tmp_path / "claims.toml").write_text(CLAIM.replace("64", "65"))
    assert run_verb(sweep.main, [f"--config={file}", f"--workdir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "claims.toml line 2" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "claims.toml").write_text(CLAIM)
    loaded, notes = sweep.load_sweep(str(file))
    assert loaded.claims == str(tmp_path / "claims.toml") and any("1 to be judged, and 0 expl" in n for n in notes)


# ---------------------------------------------------------------------------------------- verdicts
def results_of(values: np.ndarray, axes: dict[str, list[Any]], metric: str = "eval/loss") -> list[Result]:
    """Returns the completed runs with these values, float array [*axes, seed]."""
    names, found = list(axes), []
    for i, place in enumerate(np.ndindex(values.shape)):
        params = {n: registered_claims.text_of(axes[n][k]) for n, k in zip(names, place[:-1], strict=True)}
        found.append(Result(str(i), params, place[-1], "completed", {metric: float(values[place])}, 0.5))
    return found


def noisy(effect: float, seed: int = 0) -> np.ndarray:
    """Returns losses [batch, rate, seed] of which batch 64 has more by `effect`, and the middle rate is best."""
    rng = np.random.default_rng(seed)
    losses = 2 + rng.normal(size=5) + 0.01 * rng.normal(size=(2, 3, 5)) + np.array([0.3, 0.0, 0.3])[:, None]
    losses[1] += effect
    return losses


@pytest.mark.parametrize(
    ("text", "effect", "verdict"),
    [
        (CLAIM, -0.1, "supported"),
        (CLAIM, 0.1, "refuted"),
        (CLAIM, 0.0, "cannot be told"),
        (ALIKE, 0.0, "supported"),
        (ALIKE, 0.2, "refuted"),
        (ALIKE, -0.2, "refuted"),
        (ALIKE, 0.05, "cannot be told"),
        (BEST, -0.1, "supported"),
        (CLAIM + "primary = false\n", -0.1, "exploration"),
        (CLAIM + 'metric = "eval/loss"\nmode = "max"\n', 0.1, "supported"),
    ],
)
def test_verdict_follows_from_the_interval_and_the_kind(text: str, effect: float, verdict: str, tmp_path: Path) -> None:
    [v] = judge(registered(text, tmp_path), results_of(noisy(effect), AXES))
    assert v.verdict == verdict and v.reason == "" and v.low < v.mean < v.high
    assert v.device_hours == 15.0, "30 runs of half an hour"


def test_numbers_of_a_claim_equal_scipys_on_the_means_over_rates(tmp_path: Path) -> None:
    losses = noisy(-0.004)
    [v] = judge(registered(CLAIM, tmp_path), results_of(losses, AXES))
    reference = stats.ttest_rel(losses[1].mean(axis=0), losses[0].mean(axis=0))
    assert (v.p, v.adjusted, v.pairs, v.method) == (pytest.approx(reference.pvalue), v.p, 5, "Holm")
    assert (v.low, v.high) == pytest.approx(reference.confidence_interval(0.95)) and v.confidence == 0.95
    deviation = (losses[1] - losses[0]).mean(axis=0).std(ddof=1)
    assert v.detectable == pytest.approx(1.68 * deviation, rel=0.01)


def test_rate_is_chosen_by_other_seeds_than_are_compared(tmp_path: Path) -> None:
    losses = noisy(0.0)
    losses[1, 0, :2] -= 5.0  # batch 64 chooses its lowest rate, at which the compared seeds are no better
    [v] = judge(registered(BEST, tmp_path), results_of(losses, AXES))
    assert v.chosen == [{RATE: "0.001"}, {RATE: "0.002"}] and v.pairs == 3
    assert v.mean == pytest.approx((losses[1, 0, 2:] - losses[0, 1, 2:]).mean()) and v.verdict == "refuted"
    assert any("0.001, is at the end of its axis" in n for n in v.notes)
    assert any("3 pairs are few" in n for n in v.notes)


def test_repetition_over_bases_counts_a_base_once(tmp_path: Path) -> None:
    rng, axes = np.random.default_rng(3), {BATCH: [8, 64], BASE: ["a", "b", "c", "d"]}
    losses = 0.01 * rng.normal(size=(2, 4, 5))
    losses[1] += np.array([-0.3, 0.1, -0.2, 0.2])[:, None]
    text = CLAIM + 'over = "model.init_from"\n'
    [v] = judge(registered(text, tmp_path, axes=axes), results_of(losses, axes))
    by_base = (losses[1] - losses[0]).mean(axis=1)
    assert (v.pairs, v.p) == (4, pytest.approx(stats.ttest_1samp(by_base, 0).pvalue)) and v.verdict == "cannot be told"
    assert any("over model.init_from" in n for n in v.notes)
    [naive] = judge(registered(CLAIM, tmp_path, axes=axes), results_of(losses, axes))
    assert naive.verdict == "supported", "over seeds alone, what bases differ by is not seen"


def test_several_claims_are_adjusted_and_one_without_runs_counts(tmp_path: Path) -> None:
    losses = noisy(-0.008)
    exploration = CLAIM.replace("large batch", "by the way, it") + "primary = false\n"
    rest = "".join(CLAIM.replace("large batch", f"c{i}") + 'metric = "eval/x"\nmode = "min"\n' for i in (1, 2))
    alone = judge(registered(CLAIM, tmp_path), results_of(losses, AXES))[0]
    found = judge(registered(CLAIM + rest + exploration, tmp_path), results_of(losses, AXES))
    assert found[0].adjusted == pytest.approx(3 * alone.p) and found[0].detectable > 1.2 * alone.detectable
    assert [v.verdict for v in found[1:]] == ["cannot be told", "cannot be told", "exploration"]
    assert "have no eval/x" in found[1].reason and math.isnan(found[1].adjusted)
    assert (found[3].method, found[3].adjusted) == ("Benjamini-Hochberg", pytest.approx(alone.p))


@pytest.mark.parametrize("status", ["stopped", "missing", "nan"])
def test_run_that_did_not_end_leaves_a_claim_open(status: str, tmp_path: Path) -> None:
    """Leaving out the seed would favour the arm whose run diverged."""
    runs = results_of(noisy(-0.1), AXES)
    if status == "missing":
        runs.pop()
        words = "1 of 15 runs of one side have no eval/loss: a seed of an arm was not run"
    elif status == "stopped":
        runs[-1] = dataclasses.replace(runs[-1], status="stopped")
        words = "trial 29 is stopped"
    else:
        runs[-1] = dataclasses.replace(runs[-1], values={"eval/loss": math.nan})
        words = "trial 29 is completed"
    [v] = judge(registered(CLAIM, tmp_path), runs)
    assert v.verdict == "cannot be told" and words in v.reason and math.isnan(v.mean)
    [v] = judge(registered(BEST, tmp_path), runs)
    assert v.verdict == "supported", "the run is not one of those that are compared"


def test_false_verdicts_stay_within_the_level(tmp_path: Path) -> None:
    """By simulation of four claims, none with a difference: any verdict is false. Unadjusted ones are the control."""
    axes = {BATCH: [8, 64], "optim.warmup_steps": [0, 1, 2, 3]}
    text = "".join(
        CLAIM.replace("large batch", f"w{i}")
        .replace("= 64", f'= 64, "optim.warmup_steps" = {i}')
        .replace("= 8", f'= 8, "optim.warmup_steps" = {i}')
        for i in range(4)
    )
    registration, rng, repeats = registered(text, tmp_path, axes=axes), np.random.default_rng(0), 200
    found = [judge(registration, results_of(rng.normal(size=(2, 4, 5)), axes)) for _ in range(repeats)]
    wrong = np.mean([any(v.verdict != verdicts.UNKNOWN for v in vs) for vs in found])
    assert wrong < 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / repeats)
    assert np.mean([any(v.p <= 0.05 for v in vs) for vs in found]) > 0.12


# ---------------------------------------------------------------------------------------- the page
def write_sweep(folder: Path, text: str, losses: np.ndarray, axes: dict[str, list[Any]]) -> Registration:
    """Writes the folder of a finished sweep whose runs have these losses, float array [*axes, seed]."""
    (folder / "runs").mkdir(parents=True)
    registration = registered(text, folder, axes=axes, seeds=list(range(losses.shape[-1])))
    rows = []
    for run in results_of(losses, axes):
        workdir = folder / "runs" / run.name
        workdir.mkdir()
        line = {"step": 1, "samples": 8, "loss": 2.0, "step_time_s": 1800.0} | dict(run.values)
        (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (workdir / "summary.json").write_text(json.dumps({"status": "completed", "last_metrics": line}))
        (workdir / "config.json").write_text(json.dumps({"resolved": {"mesh": {"data": 2, "fsdp": 1}}}))
        (workdir / "events.jsonl").write_text(json.dumps({"step": 0, "event": "start", "time": time.time()}) + "\n")
        row = {"number": run.name} | dict(run.params) | {"seed": run.seed, "status": "completed", "reason": ""}
        rows.append(row | {"metric": run.values["eval/loss"]})
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    about = {"metric": "'eval/loss'", "mode": "'min'", "stop": "None"}
    settings = {"base": {}, "sweep": about, "registered_claims": registration.to_json()}
    (folder / "sweep.json").write_text(json.dumps(settings))
    return registration


def test_page_judges_registered_claims_and_no_changed_ones(tmp_path: Path, capsys: Any) -> None:
    axes, folder = {BATCH: [8, 64], "optim.schedule": ["constant", "cosine"]}, tmp_path / "sweep"
    rng = np.random.default_rng(0)
    losses = 2 + 0.01 * rng.normal(size=(2, 2, 5)) + np.array([0.2, 0.0])[:, None, None]
    exploration = CLAIM.replace("large batch", "another").replace("= 64", '= 64, "optim.schedule" = "cosine"')
    exploration = exploration.replace("= 8", '= 8, "optim.schedule" = "cosine"') + "primary = false\n"
    registration = write_sweep(folder, CLAIM + exploration, losses, axes)
    found = content.of_sweep(folder)["claims"]
    [judged], [explored] = found["judged"], found["explored"]
    wanted = judge(registration, results_of(losses, axes))
    assert judged["verdict"] == "supported" and judged["mean"] == pytest.approx(wanted[0].mean, rel=1e-3)
    assert judged["contrast"] == "batch_size 64 minus batch_size 8; mean over schedule"
    assert explored["contrast"] == "batch_size 64, schedule cosine minus batch_size 8, schedule cosine"
    assert (explored["verdict"], explored["method"]) == ("exploration", "Benjamini-Hochberg")
    assert judged["device_hours"] == 20.0, "20 runs of half an hour on two devices"

    assert run_verb(report.main, [f"--workdir={folder}"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("claim ")]
    assert line.startswith("claim 'large batch ends better': supported; difference -0.2")
    assert "adjusted p" in line and line.endswith("; 20 device hours")

    def problem_of() -> str:
        read = read_runs.read_sweep(folder)
        registration, problem = claims_table.registration_of(folder, read.settings, read.runs)
        assert registration is None
        return problem

    written = (folder / "claims.toml").read_text()
    (folder / "claims.toml").write_text(written.replace("ends better", "ends worse"))
    assert problem_of() == "claims.toml is not the file that was registered before the first run, so no claim is judged"
    (folder / "claims.toml").write_text(written)
    settings = json.loads((folder / "sweep.json").read_text())
    settings["registered_claims"]["registered"] = "2100-01-01T00:00:00+00:00"
    (folder / "sweep.json").write_text(json.dumps(settings))
    assert problem_of() == "claims.toml was registered after the first run had begun, so no claim is judged"
    settings["registered_claims"] = {"claims": 1}
    (folder / "sweep.json").write_text(json.dumps(settings))
    assert problem_of() == "the registered claims in sweep.json are damaged, so no claim is judged"
    del settings["registered_claims"]
    (folder / "sweep.json").write_text(json.dumps(settings))
    assert problem_of() == "", "a sweep without claims has no verdicts, and nothing is wrong with it"


def test_verdicts_on_a_stored_sweep_of_real_curves(tmp_path: Path) -> None:
    """The toy network of tests/data/lab_curves, whose rates are chosen on seeds 0 to 2 and compared on 3 to 5."""
    stored = stored_sweeps.load(Path(__file__).parent / "data" / "lab_curves" / "C.npz")
    axes, seeds = {name: list(values) for name, values in stored.axes.items()}, list(range(6))
    text = "choose_seeds = [0, 1, 2]\n"
    for name, kind, a, b in (("large", "better", 256, 16), ("small", "better", 16, 256), ("alike", "alike", 64, 16)):
        margin = "margin = 0.02\n" if kind == "alike" else ""
        text += f'[[claim]]\nname = "{name}"\nkind = "{kind}"\nbest = ["{RATE}"]\n{margin}'
        text += f'arms = {{"{BATCH}" = {a}}}\nagainst = {{"{BATCH}" = {b}}}\n'
    losses = np.moveaxis(stored.curves[..., -1].astype(float), 0, -1)
    found = judge(registered(text, tmp_path, axes=axes, seeds=seeds), results_of(losses, axes))
    assert [v.verdict for v in found] == ["refuted", "supported", "refuted"]
    rates = [losses[b][:, :3].mean(axis=1).argmin() for b in (2, 0)]
    d = losses[2, rates[0], 3:] - losses[0, rates[1], 3:]
    assert (found[0].mean, found[0].p) == pytest.approx((d.mean(), stats.ttest_1samp(d, 0).pvalue))
