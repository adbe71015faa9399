# SPDX-License-Identifier: Apache-2.0
"""The evidence is only as good as its scripts."""

import argparse
import json
import math
import re
import statistics
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import scipy.stats
import torch
import transformers

import gpart
import train_glue
from experiments import (
    algebra,
    bench,
    bench_parts,
    decay,
    dimension,
    evidence,
    glue_table,
    isometry,
    landscape,
    peers,
    runs,
    scaling,
    stateless,
    train_math,
    train_vision,
    verdicts,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant")  # PEFT's SHiRA


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads(read(RESULTS / f"{name}.json"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the precision of its first user, and refuses another one."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_results_say_what_they_ran_on(path: Path) -> None:
    """Every result file names its torch and its device, and no path of a machine."""
    result = json.loads(read(path))
    assert result["torch"] and result["device"]
    assert "/tmp" not in read(path) and "/home" not in read(path)


# --- The peers ---
def trained_numbers(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_peers_train_as_many_numbers_as_published() -> None:
    """On RoBERTa-base's query and value: the counts of the paper's Table 1."""
    expected = {"unilora": 23040, "lora": 294912, "vera": 43008, "fourierft": 24000}
    expected["bitfit"] = 102144
    for method, numbers in expected.items():
        settings = transformers.RobertaConfig()
        with torch.device("meta"):
            model = transformers.RobertaModel(settings, add_pooling_layer=False)
        peers.adapt(model, method, 23040, ["query", "value"])
        assert trained_numbers(model) == numbers, method


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("side", bench.SIDES)
def test_every_side_of_the_bench_trains(side: str) -> None:
    """Two steps move every trained tensor, and nothing else."""
    one = bench.Side(side, "tiny", 2, 8, "fp32", "cpu")
    one.optimizer.param_groups[0]["lr"] = 0.1
    named = dict(one.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        assert one.step() > 0
    moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
    still = {name for name, p in named.items() if p.requires_grad} ^ moved
    # A bias of the keys shifts all scores of a query alike.
    assert all(side == "full" and "key.bias" in name for name in still), still
    size = bench.adapter_bytes(side, one.model)
    assert size > 4 * sum(p.numel() for p in one.trained)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compile_keeps_the_weights_unless_told_to_recompute() -> None:
    """For backward: nothing of a weight's size beyond the dense floor in eager mode;
    compiled the two W + P theta whose layer has a gradient to pass on; recomputed
    nothing again."""
    torch.compiler.reset()
    weight, small = 4 * 32 * 32, 1000  # bytes; theta and its scale have 100 numbers

    def kept(side: str) -> int:
        return bench.Side(side, "tiny", 2, 8, "fp32", "cpu").kept()

    floor, compiled_floor = kept("dense"), kept("dense, compiled")
    assert 0 <= kept("gpart") - floor < small
    assert 0 <= kept("gpart, compiled") - compiled_floor - 2 * weight < small
    assert kept("gpart, compiled, recomputed") < compiled_floor


def test_every_way_to_write_a_layer_runs() -> None:
    """Each that bench_parts.py times; of its parts too."""
    for actions in (bench_parts.layer("cpu", 1, 2), bench_parts.single("cpu", 1, 2)):
        for action in actions.values():
            action()


def test_scaling_refuses_a_formula_that_is_off() -> None:
    """Two per mille are too many."""
    scaling.check({"state": 1000.5}, {"state": 1000.0})
    with pytest.raises(ValueError, match="state: counted 1,002"):
        scaling.check({"state": 1002.0}, {"state": 1000.0})


def test_peers_of_size_d_train_d_numbers() -> None:
    """On MiniLM's query and value d of them; C3A as near as its blocks allow."""
    expected = {"unilora": 23040, "shira": 23040, "waveft": 23040, "c3a": 27648}
    assert {*expected} == {*peers.SIZED}
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 8}
    settings = transformers.BertConfig(vocab_size=9, **shape)
    for method, numbers in expected.items():
        model = transformers.BertModel(settings, add_pooling_layer=False)
        peers.adapt(model, method, 23040, ["query", "value"])
        assert trained_numbers(model) == numbers, method


@pytest.mark.parametrize("method", ["unilora", "vera", "fourierft", "shira", "waveft"])
def test_seed_draws_another_structure(method: str) -> None:
    """The same trained numbers give the same update, and another for another seed."""
    updates = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(32, 32)})
        peers.adapt(model, method, 64, ["a"], seed=seed)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(generator=torch.Generator().manual_seed(1))
        update = model["a"].get_delta_weight("default")
        updates.append(update.to_dense() if update.is_sparse else update)
    assert torch.equal(updates[0], updates[1]) and updates[0].abs().max() > 0
    assert not torch.equal(updates[0], updates[2])


# --- The grid ---
@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """put(task, method, rate, seed, metric): a finished cell, in its own folder."""
    monkeypatch.setattr(glue_table, "CELLS", tmp_path)

    def put(
        task: str, method: str, rate: float, seed: int, metric: float | None
    ) -> None:
        content = {"dev": metric, "metric": metric, "trainable": 7}
        path = glue_table.cell(task, method, rate, seed)
        path.write_text(json.dumps(content), encoding="utf-8")

    return put


def test_best_rate_is_the_best_mean_of_two_tasks(cells: Any) -> None:
    """None before all ten runs are there; a run that diverged counts as the worst."""
    five = glue_table.rates("lora")
    powers = [5e-4 * 3.0**k for k in range(-2, 3)]
    assert sorted(five) == pytest.approx(powers, rel=1e-2)
    for k, rate in enumerate(five):
        assert glue_table.best_rate("lora") is None
        cells("stsb", "lora", rate, 0, 0.9 if k == 1 else 0.6)
        cells("sst2", "lora", rate, 0, None if k == 1 else 0.5 + 0.1 * (k == 3))
    assert glue_table.best_rate("lora") == five[3]


def test_good_rates_are_good_on_both_tasks(cells: Any) -> None:
    """Within 3 points of the task's own best; a run that diverged is not."""
    dev = {
        "stsb": [0.8, 0.785, 0.76, 0.795, None],
        "sst2": [0.905, 0.86, 0.91, 0.92, 0.92],
    }
    for task, values in dev.items():
        for rate, value in zip(glue_table.rates("lora"), values, strict=True):
            cells(task, "lora", rate, 0, value)
    assert glue_table.good_rates("lora", 0.03) == [0.0005, 0.0045]
    cells_of_row = glue_table.rate_table().splitlines()[-1].split(" | ")[2:]
    assert cells_of_row == [
        "0.0045",
        "0.0005, 0.0045",
        "0.000167, 0.0005, 0.0045",
        "0.000167, 0.0005, 0.0015, 0.0045 |",
    ]


def test_rates_of_both_variants_take_the_same_steps() -> None:
    """A step of lr moves a weight by lr / sqrt(n), without isometry by lr."""
    shrink = (glue_table.N / glue_table.D) ** 0.5
    scaled = [rate * shrink for rate in glue_table.rates("gpart-noniso")]
    assert [*glue_table.rates("gpart")] == pytest.approx(scaled, rel=0.01)


def test_table_says_how_many_seeds_it_has(cells: Any) -> None:
    """Median and deviation over the seeds there are; an average only of five tasks."""
    for rate in glue_table.rates("gpart"):
        for task in ("stsb", "sst2"):
            cells(task, "gpart", rate, 0, rate)
    best = glue_table.best_rate("gpart")
    for seed, value in ((0, 0.5), (1, 0.7), (2, 0.6)):
        for task in [*glue_table.TASKS][: 5 - (seed == 2)]:
            cells(task, "gpart", best, seed, value)
    table = glue_table.table({"gpart": (0, 1, 2), "vera": (0,)})
    row = table.splitlines()[-1]  # GPart's: there is none of VeRA yet
    assert row.startswith("| GPart | 7 | 0.045 | 60.0 ± 10.0 | ")
    assert row.endswith("| 60.0 ± 14.1 (2 of 3) | 60.0 |")


def test_every_cell_is_of_todays_budget() -> None:
    """What a result says of its settings is what its name and BUDGET say."""
    paths = list(glue_table.CELLS.glob("*.json"))
    assert len(paths) >= 5 * 10 + 5 * 5 * 2  # five searches, five methods on five tasks
    pattern = re.compile(r"(\w+)-(.+?)(?:-d(\d+))?-lr(.+)-seed(\d)")
    for path in paths:
        task, method, d, rate, seed = re.fullmatch(pattern, path.stem).groups()
        one = (task, method, float(rate), int(seed), int(d or glue_table.D))
        assert glue_table.cell(*one) == path
        found = json.loads(read(path))["settings"]
        asked = vars(train_glue.parser().parse_args(glue_table.command(*one)))
        for key in ("task", "method", "d", "seeds", "bf16", "max_steps", "max_length"):
            assert found[key] == asked[key], (path.stem, key)
        assert found["max_train_samples"] == asked["max_train_samples"]
        assert found["head_lr"] == (asked["head_lr"] or 1e-3)
        assert method == "head" or found["lr"] == float(rate)
        assert method != "head" or found["head_lr"] == float(rate)


@pytest.mark.parametrize("method", glue_table.RATES)
def test_no_command_has_a_flag_that_is_refused(method: str) -> None:
    """Of glue_table.py and of evidence.py, for every method."""
    lines = [glue_table.command("stsb", method, 0.1, 0)]
    if method in peers.SIZED or method.startswith("gpart"):
        lines += [evidence.Cell("stsb", method, 0.1, 3).command]
        lines += [evidence.Cell("stsb", one, 0.1, 3).command for one in peers.SIZED]
    for line in lines:
        args = train_glue.parser().parse_args(line)
        train_glue.check_flags(args, line, processes=1)


def test_head_beside_an_adapter_has_the_rate_of_the_head_alone() -> None:
    """On the three tasks that the docstring names, whatever its search finds."""
    for task in ("rte", "mrpc", "cola"):
        args = train_glue.parser().parse_args(glue_table.command(task, "gpart", 0.1, 0))
        assert (args.lr, args.head_lr) == (0.1, glue_table.best_rate("head"))


def test_glue_md_has_the_tables_of_the_cells() -> None:
    """Table 1, the margins and the rates."""
    page = read(RESULTS / "glue.md")
    assert glue_table.table(glue_table.TABLE_1) in page
    others = glue_table.THREE_SEEDS[1:]
    assert glue_table.margins("gpart", others, glue_table.SEEDS) in page
    assert glue_table.rate_table() in page


def test_margins_pair_the_seeds(cells: Any) -> None:
    """A spread that both share is none of their difference; a hole leaves a hole."""
    for method, less in (("gpart", 0.0), ("lora", 0.25)):
        for rate in glue_table.rates(method):
            for task in ("stsb", "sst2"):
                cells(task, method, rate, 0, rate)
        best = glue_table.best_rate(method)
        for seed, value in ((0, 0.5), (1, 0.75), (2, 1.0)):
            for task in [*glue_table.TASKS][: 5 - (seed == 2)]:
                cells(task, method, best, seed, value - less)
    row = glue_table.margins("gpart", ("lora",), (0, 1, 2)).splitlines()[-1]
    assert row == f"| LoRA, rank 8 | {'+25.0 ± 0.0 | ' * 4} |  |"
    cells("cola", "gpart", glue_table.best_rate("gpart") or 0, 2, None)  # diverged: 0
    cells("cola", "lora", glue_table.best_rate("lora") or 0, 2, 0.75)
    row = glue_table.margins("gpart", ("lora",), (0, 1, 2)).splitlines()[-1]
    assert row.endswith("| -8.3 ± 57.7 | +18.3 ± 11.5 |")


def test_finished_cells_are_not_run_again(
    cells: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run gives back what the file says, and run_all starts no process for it."""
    monkeypatch.delattr(glue_table.multiprocessing, "get_context")
    cells("rte", "head", 1e-3, 2, 0.6)
    job = glue_table.job("rte", "head", 1e-3, 2)
    assert glue_table.run(None, *job)["metric"] == 0.6
    glue_table.run_all(None, [job])


def test_a_run_that_is_refused_says_why(tmp_path: Path) -> None:
    """train_glue.py's own words, though its output is swallowed."""
    args = argparse.Namespace(data_dir=str(tmp_path / "none"), work=str(tmp_path))
    with pytest.raises(SystemExit, match=r"train_glue.* no file .*--data-dir takes"):
        glue_table.trained(args, "stsb", "gpart", 0.1, 0)
    with pytest.raises(RuntimeError, match=r"stsb-gpart-lr0.1-seed7: .* no file "):
        glue_table.run(args, *glue_table.job("stsb", "gpart", 0.1, 7))


def test_a_folder_that_is_not_there_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a process is started for any cell; a folder that is there is taken."""
    command = ["glue_table", "--data-dir"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path)])
    assert glue_table.parse(None).data_dir == str(tmp_path)
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        glue_table.parse(None)
    assert "none: no such folder; it takes" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path), "--workers", "0"])
    with pytest.raises(SystemExit):
        glue_table.parse(None)
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err


def test_only_a_script_that_renders_goes_without_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dimension", "--render"])
    assert glue_table.parse(None).render
    monkeypatch.setattr(sys, "argv", ["evidence", "--render"])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "--render" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["evidence"])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "--data-dir names the folder" in capsys.readouterr().err


def test_scaled_rate_keeps_the_step_of_a_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """lr / sqrt(N / d) is the same for every d, to the three digits that a rate has."""
    monkeypatch.setattr(glue_table, "best_rate", lambda method: 0.005)
    steps = [rate * d**0.5 for d, rate in dimension.points("scaled")]
    assert steps == pytest.approx([0.005 * 23040**0.5] * len(steps), rel=5e-3)
    assert {rate for _, rate in dimension.points("fixed")} == {0.005}
    assert max(d for d, _ in dimension.points("unilora")) == 23040


def test_points_where_neither_learns_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tie is not won, a run that diverged is 0, and 23,040 is one run, not two."""
    metrics: dict[str, list[float | None]] = {
        "fixed": [0.1, 0.3, 0.5, None, 0.6],
        "scaled": [0.2, 0.4, 0.5, 0.7, 0.6],
    }

    def found(task: str, curve: str) -> list[tuple[int, dict[str, Any]]]:
        sizes = [16, 90, 360, 1440, 23040]
        cells = [{"metric": m, "majority": 0.25} for m in metrics[curve]]
        return [*zip(sizes, cells, strict=True)]

    monkeypatch.setattr(dimension, "TASKS", ("stsb",))
    monkeypatch.setattr(dimension, "found", found)
    assert dimension.scaled_wins() == (2, 3)


def test_plateau_is_what_is_within_a_point_of_the_best() -> None:
    """A run that diverged is on no plateau."""
    cells = [(16, 0.5), (90, 0.791), (360, 0.8), (1440, None), (5760, 0.795)]
    assert dimension.plateau([(d, {"metric": m}) for d, m in cells]) == [90, 360, 5760]


def test_pages_have_the_tables_of_their_files() -> None:
    """Of dimension, landscape, decay and isometry."""
    around = runs.Record(RESULTS / "landscape.json", {})
    decays = runs.Record(RESULTS / "decay.json", {})
    names = {*decays.content["cells"]}
    kinds = {kind: decay.curves(decays, "nowhere", kind) for kind in decay.DECAYS}
    assert names == {*decays.content["cells"]}  # nothing was trained
    tables = {
        "dimension": dimension.table(),
        "landscape": landscape.table(around.content["cells"]),
        "decay": decay.table(kinds),
        "isometry": isometry.table(results("isometry")["methods"]),
    }
    for name, table in tables.items():
        assert table in read(RESULTS / f"{name}.md")


# --- The report ---
REPORT = read(RESULTS.parent / "README.md")
SENTENCES = " ".join(REPORT.split())


def test_every_table_of_the_report_is_of_a_result() -> None:
    """Each row stands in a page of results/, or is made from a file there; but for the
    list of verdicts and that of the scripts."""
    made = [
        *map(read, RESULTS.glob("*.md")),
        *(
            table
            for device in ("cpu", "cuda")
            for table in (
                *map(bench.table, results(f"bench-{device}")["cases"]),
                stateless.table(results(f"stateless-{device}")),
            )
        ),
        train_math.table(results("math")),
        train_vision.table(results("vision")),
    ]
    rows = {row for text in made for row in text.splitlines()}
    tables = re.findall(r"(?:^\|.*\n)+", REPORT, flags=re.MULTILINE)
    own = ("| question | verdict |", "| script | what it shows |")
    tables = [table for table in tables if not table.startswith(own)]
    assert len(tables) > 10
    for table in tables:
        assert [row for row in table.splitlines() if row not in rows] == []


def test_report_lists_every_script() -> None:
    """What can be run is in the table at the top."""
    named = {*re.findall(r"`(\w+)", REPORT[: REPORT.index("## GLUE")])}
    files = RESULTS.parent.glob("*.py")
    scripts = {path.stem for path in files if "\nif __name__ ==" in read(path)}
    assert scripts and scripts <= named


def test_report_says_what_the_runs_took() -> None:
    """The line below the title of each page, as it stands there."""
    for name in ("glue", "dimension", "landscape", "decay"):
        assert read(RESULTS / f"{name}.md").splitlines()[2] in REPORT
    assert dimension.took() in REPORT


def test_report_has_the_intervals() -> None:
    """95 %, of GPart minus its rivals in three pairs: of a task or of the mean of
    several, of the language model and of the vision transformer."""

    def glue(other: str, *tasks: str) -> list[float]:
        scores = {
            method: [
                100 * statistics.fmean(glue_table.score(t, method, seed) for t in tasks)
                for seed in glue_table.SEEDS
            ]
            for method in ("gpart", other)
        }
        return [a - b for a, b in zip(scores["gpart"], scores[other], strict=True)]

    def beyond(name: str, other: str, score: Any) -> list[float]:
        content = results(name)
        scores = {
            method: [score(content["cells"][cell]["test"]) for cell in chosen["cells"]]
            for method, chosen in content["chosen"].items()
        }
        return [a - b for a, b in zip(scores["gpart"], scores[other], strict=True)]

    three = ("stsb", "sst2", "mrpc")
    points = [
        glue("head", "stsb"),
        glue("gpart-noniso", "stsb"),
        glue("lora", "stsb"),
        glue("unilora", *three),
        *(glue("unilora", task) for task in (*three, "cola")),
        *(beyond("vision", other, lambda x: 100 * x) for other in ("unilora", "head")),
    ]
    loss = lambda test: next(iter(test.values()))["loss"]  # noqa: E731
    nats = [beyond("math", other, loss) for other in ("unilora", "lora")]
    for digits, every in ((1, points), (4, nats)):
        for values in every:
            found = verdicts.interval(values)
            mean, low, high = (f"{x:+.{digits}f}" for x in found[:3])
            assert f"{mean} [{low}, {high}]" in SENTENCES


def test_report_quotes_the_files() -> None:
    """Of a step, serving, scale and d: the figures that stand in a sentence."""
    (case,) = results("bench-cpu")["cases"]
    low, step, high = case["rows"]["gpart"]["to_dense"]
    serving, models = results("serving"), results("scale")["models"]
    ms = {name: 1e3 * value for name, value in serving["seconds"].items()}
    slower = {
        side: [serving["forward_to_plain"][f"{side}, {n}"] for n in (1, 16, 128)]
        for side in ("gpart", "lora")
    }
    ids = [
        1e9 * row["groups_seconds"] / row["N"] for row in results("scale")["partition"]
    ]
    base, large = models["RoBERTa-base"], models["RoBERTa-large"]
    llama = models["Llama 3 8B, by matrix"]
    shape = results("scaling")["models"]["Llama 3 8B"]
    threads = results("ids-cpu")["to_one_thread"]
    won, of = dimension.scaled_wins()
    forgets = results("stateless-cpu")
    ns = {name: times[1] for name, times in forgets["layers"][0]["ns_a_weight"].items()}
    rows = forgets["cases"][0]["rows"]
    of_floor = {name: rows[name]["to_dense, processor"][1] for name in rows}
    bf16, fp32, long = (one["rows"] for one in results("bench-cuda")["cases"])
    on_gpu = results("ids-cuda")["ns"]
    kernels = results("stateless-cuda")["layers"][1]["ns_a_weight"]
    for quote in (
        f"takes {1e3 * bf16['dense']['seconds'][1]:.0f} ms with 128 tokens a row and "
        f"{1e3 * long['dense']['seconds'][1]:.0f} with 512",
        f"GPart is then at {bf16['gpart']['to_dense'][1]:.2f} and "
        f"{long['gpart']['to_dense'][1]:.2f} of the floor",
        f"own, at {bf16['plain']['to_dense'][1]:.2f} and "
        f"{long['plain']['to_dense'][1]:.2f}.",
        f"sums take the time, GPart is at {fp32['gpart']['to_dense'][1]:.2f}.",
        f"an id takes {on_gpu['groups']:.2f} ns",
        f"it would take {on_gpu['2^15, 1 threads']:.0f} ns",
        f"in chunks of 2^20 {on_gpu['2^20, 1 threads']:.1f}.",
        f"{kernels['stateless, W + P theta'][0]:.4f} ns a weight for W + P theta, "
        f"{kernels['stored, W + P theta'][0]:.4f} from stored ids, beside "
        f"{kernels['x W^T'][0]:.4f} for the product",
        f"**{of_floor['stateless']:.2f} of the floor's time**",
        f"a step {of_floor['stateless']:.2f} of the floor (target 1.15",
        f"stored ids {of_floor['gpart']:.2f})",
        f"takes {ns['stateless, ids']:.1f} ns on one core",
        f"`Partition.groups` takes {ns['Partition.groups']:.0f}.",
        f"{rows['stateless']['ids_bytes'] / 1e3:.0f} kB in place of "
        f"{rows['gpart']['ids_bytes'] / 1e6:.0f} MB",
        f"{step:.3f} of it, quartiles {low:.2f} to {high:.2f}",
        f"{case['rows']['gpart']['to_unilora'][1]:.2f} of its time",
        f"from a file takes {ms['file gpart']:.1f} ms (LoRA {ms['file lora']:.0f})",
        f"from memory {ms['memory gpart']:.2f} ms ({ms['memory lora']:.1f})",
        f"weights {ms['merged gpart']:.0f} ms ({ms['merged lora']:.0f})",
        "{:.2f}, {:.2f} and {:.2f} of the plain".format(*slower["gpart"]),
        "(LoRA {:.2f}, {:.2f}, {:.2f})".format(*slower["lora"]),
        f"{min(ids):.0f} to {max(ids):.0f} ns a weight",
        f"attach takes {base['attach']:.1f} s and load {base['load']:.1f} s",
        f"{large['attach']:.1f} and {large['load']:.1f} s for RoBERTa-large",
        f"{1 + 12 * shape['N'] / shape['A']:.1f} times the traffic",
        f"takes {threads['groups']:.2f} of one's time",
        f"and {threads['2^17, 2 threads']:.2f} in chunks of 2^17",
        f"ids then take {llama['ids']:.0f} s and the update {llama['merge']:.0f} s",
        f"beats one fixed rate at {won} of {of} points",
        f"beats one fixed rate at {won} of the {of} points at which either learns",
    ):
        assert quote in SENTENCES


def test_what_learns_rte_is_of_the_runs() -> None:
    """The page has a row for each file, the README the best of them on a CPU, and what
    the same script gives on STS-B."""
    page, best = read(RESULTS / "rte.md"), 0.0
    for path in (RESULTS / "rte").glob("*.json"):
        run = json.loads(read(path))
        s, per_seed = run["settings"], [f"{x:.3f}" for x in run["per_seed"]]
        steps = f"{s['steps']:,} x {s['batch_size']}"
        row = f"| {run['method']} | {s['lr']:g} | {steps} | {', '.join(per_seed)} |"
        assert f"{row} {run['minutes']:.1f} | {run['device']} |" in page
        if "CPU" in run["device"] and run["median"] > best:
            best = run["median"]
            quote = f"{per_seed[0]} in {run['minutes']:.0f} minutes, one seed"
    readme, stsb = read(ROOT / "README.md"), results("stsb-200-cpu")
    assert best > run["majority"] and quote in readme
    quote = f"a Pearson of {stsb['median']:.3f} in {stsb['minutes']:.0f} minutes"
    assert quote in readme and stsb["settings"]["steps"] == 200


@pytest.mark.parametrize("folder", ["experiments", "tests"])
def test_report_links_to_what_is_there(folder: str) -> None:
    """Files, figures, and its own sections; so does the page of the tests."""
    page = ROOT / folder / "README.md"
    text = read(page)
    titles = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    sections = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in sections
        else:
            assert (page.parent / target).exists(), target


def test_page_of_the_tests_has_the_table_of_numerics() -> None:
    """tests/README.md, from tests/results/numerics.json."""
    page = read(ROOT / "tests" / "README.md")
    content = json.loads(read(ROOT / "tests" / "results" / "numerics.json"))
    for row in content["rows"]:
        base, theta = row.pop("base"), row.pop("theta")
        cells = " | ".join(f"{x:.3g}" for x in row.values())
        assert f"| {base} | x {theta:g} | {cells} |" in page


# --- Beyond GLUE ---
def test_algebra_holds_on_real_adapters() -> None:
    """Distances and cosines of theta are those of the updates, LoRA's factors' not."""
    record = runs.Record(RESULTS / "algebra.json", {})
    assert algebra.render(record) == read(RESULTS / "algebra.md")
    cells = record.content["cells"]
    found = {name: cell["found"] for name, cell in cells.items()}
    for pair in found["geometry"]["gpart"].values():
        assert pair["coordinates"] == pytest.approx(pair["update"], rel=1e-6, abs=1e-6)
    for pair in found["geometry"]["lora"].values():
        assert pair["coordinates"]["distance"] > 1.1 * pair["update"]["distance"]
    assert found["nest"]["update changed by"] < 1e-6
    gauge = found["gauge"]
    assert gauge["c = 10"]["update"]["distance"] < 1e-6 * gauge["norms"]["update"]


# --- Decay and landscape ---
@pytest.mark.parametrize("factor", [1.0, 8.8, 76.8])
def test_decay_finds_the_factor_between_two_curves(factor: float) -> None:
    """The same curve, shifted along the decay: its factor, wherever the points lie."""
    norm = lambda x: 3.0 / (1.0 + x) ** 2  # noqa: E731
    grid = [10.0**k for k in range(-4, 5)]
    curves = {
        "gpart": [(0.0, 3.0), *((x, norm(x)) for x in grid)],
        "gpart-noniso": [(0.0, 3.0), *((x * factor, norm(x)) for x in grid)],
    }
    assert decay.summary(curves)["factor"] == pytest.approx(factor)


def test_decay_refuses_to_guess_beyond_its_points() -> None:
    """A level that a curve does not reach is an error, not the curve's last point."""
    curve = [(0.0, 3.0), (1.0, 2.9), (10.0, 2.8)]
    with pytest.raises(ValueError, match="no crossing of 1 in"):
        decay.crossing(curve, 1.0)


def test_decay_from_beginning_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decay that works as expected is found to, and a second call trains nothing."""
    trained = []

    def train(data_dir: str, method: str, kind: str, wd: float) -> dict[str, float]:
        trained.append((method, kind, wd))
        middle = {"Adam": 1e-5, "AdamW": 3.0}[kind]
        middle *= 1.0 if method == "gpart" else decay.EXPECTED[kind]
        return {"norm": 1 / (1 + wd / middle)}

    monkeypatch.setattr(decay, "train", train)
    monkeypatch.setattr(decay, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(sys, "argv", ["decay", "--data-dir", "glue"])
    for _ in range(2):
        decay.main()
        assert len(trained) == len({*trained}) == 24
    rows = read(tmp_path / "results" / "decay.md").splitlines()
    assert any(row.startswith("| Adam | N/d = 76.8 | 76.8 |") for row in rows)
    assert any(row.startswith("| AdamW | sqrt(N/d) = 8.76 | 8.76 |") for row in rows)


class Quadratic(torch.nn.Module):
    """loss = theta^T A theta / 2 + an offset for each batch."""

    def __init__(self, A: torch.Tensor, theta: torch.nn.Parameter) -> None:
        super().__init__()
        self.A, self.theta = A, theta

    def forward(self, offset: float) -> Any:
        return types.SimpleNamespace(loss=self.theta @ self.A @ self.theta / 2 + offset)


def test_landscape_measures_the_hessian() -> None:
    """Of a quadratic loss: its values, its matrix, and theta as it was afterwards."""
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=draw)
    A, u = A + A.T, torch.randn(6, generator=draw)
    loss = landscape.Loss.__new__(landscape.Loss)
    loss.theta = torch.nn.Parameter(torch.randn(6, generator=draw))
    loss.start = loss.theta.detach().clone()
    loss.model = Quadratic(A, loss.theta)
    loss.batches = [{"offset": 1.0}, {"offset": 3.0}]
    torch.testing.assert_close(loss.hessian(u), A @ u)
    assert loss.at(u) == pytest.approx(float(u @ A @ u / 2 + 2), rel=1e-5)
    assert torch.equal(loss.theta, loss.start)


def test_landscape_measures_how_far_weights_move() -> None:
    """|J u| = |u| for GPart, sqrt(n) |u| without isometry."""
    for isometric, expected in ((True, 1.0), (False, 8.0)):
        net = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
        g = gpart.attach(net, 4, target_modules="0", isometric=isometric, fused=False)
        loss = landscape.Loss.__new__(landscape.Loss)
        loss.model, loss.theta, loss.start = net, g.theta, g.theta.detach().clone()
        assert loss.moved(landscape.unit(4, 0)) == pytest.approx(expected, rel=1e-3)


def test_landscape_does_not_depend_on_the_units_of_theta(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without isometry its curvature is n-fold, per weight distance the same."""
    monkeypatch.setattr(landscape, "DIRECTIONS", 3)
    monkeypatch.setattr(landscape, "SIDE", 2)
    d, n = 32, 8
    half = torch.randn(d, d, generator=torch.Generator().manual_seed(0))
    A, found = half @ half.T, {}
    for isometric in (True, False):
        net = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
        g = gpart.attach(net, d, target_modules="0", isometric=isometric, fused=False)
        loss = landscape.Loss.__new__(landscape.Loss)
        curvature = A if isometric else n * A
        loss.model, loss.theta = Quadratic(curvature, g.theta), g.theta
        loss.start = landscape.unit(d, 7)
        loss.model.net, loss.batches, loss.metric = net, [{"offset": 1.0}], 0.5
        found[isometric] = landscape.measure(loss)
    top = torch.linalg.eigvalsh(A).flip(0)[:5].tolist()
    for isometric, result in found.items():
        scaled = [value * (1 if isometric else n) for value in top]
        assert result["top"] == pytest.approx(scaled, rel=1e-3)
        assert result["top per weight distance"] == pytest.approx(top, rel=1e-2)
    ratios = [result["ratio"] for result in found.values()]
    assert ratios == pytest.approx(ratios[:1] * 2, rel=1e-3)
    assert json.loads(json.dumps(found[True])) == found[True]
    cells = {f"gpart-{seed}": found[True] for seed in range(3)}
    cells |= {f"unilora-{seed}": found[False] for seed in range(3)}
    rows = [line.split(" | ") for line in landscape.table(cells).splitlines()]

    def ratios_of(row: list[str]) -> list[float]:
        return [float(x) for x in row[3].rstrip(" |").split(", ")]

    (largest,) = (row for row in rows if row[0] == "| largest eigenvalue")
    assert ratios_of(largest) == pytest.approx([n] * 3, rel=1e-2)
    per_weight_distance = rows[-1]
    assert ratios_of(per_weight_distance) == pytest.approx([1] * 3, rel=2e-2)
    first = landscape.spectra(cells).splitlines()[2].split(" | ")
    assert [float(x) for x in first[2].split(", ")] == pytest.approx(top, rel=1e-2)


def test_landscape_is_that_of_the_solutions_in_the_first_table() -> None:
    """Each seed's own, at the method's best rate: its cell has the same metric."""
    around = runs.Record(RESULTS / "landscape.json", {}).content["cells"]
    assert len(around) == len(landscape.METHODS) * len(landscape.SEEDS)
    for method in landscape.METHODS:
        for seed in landscape.SEEDS:
            score = glue_table.score("stsb", method, seed)
            assert around[f"{method}-{seed}"]["metric"] == pytest.approx(score)


def test_landscape_measures_the_rise_of_the_loss() -> None:
    """The mean over a grid, above the loss in its middle."""
    flat, bowl = [[2.0] * 3] * 3, [[4.0, 3.0, 4.0], [3.0, 2.0, 3.0], [4.0, 3.0, 4.0]]
    rises = landscape.rises({"loss": 2.0, "grids": [flat, bowl]})
    assert rises == pytest.approx([0, 12 / 9])


# --- Algebra ---
@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize(
    "N, d, k", [(12, 1, 12), (13, 2, 3), (1000, 7, 9), (60, 60, 1)]
)
def test_embedding_leaves_the_update(N: int, d: int, k: int, isometric: bool) -> None:
    """theta in d groups and embedded in k d groups move every weight alike."""
    coarse = gpart.Partition(N, d, seed=3, isometric=isometric)
    fine = gpart.Partition(N, k * d, seed=3, isometric=isometric)
    draw = torch.Generator().manual_seed(0)
    theta = torch.randn(d, generator=draw, dtype=torch.float64)
    embedded = algebra.embed(theta, coarse, fine)
    torch.testing.assert_close(fine.expand(embedded), coarse.expand(theta))
    if isometric:
        torch.testing.assert_close(embedded, fine.reduce(coarse.expand(theta)))


def test_other_gauge_has_the_same_update() -> None:
    """(cB, A/c): equal to rounding, for c = 2^k bit for bit; no factor's entry is."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    peers.adapt(model, "lora", 0, ["0", "1"])
    for p in model.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    factors, update = algebra.lora_factors(model), algebra.lora_update(model)
    algebra.regauge(model, 4.0)
    assert not torch.isclose(algebra.lora_factors(model), factors).any()
    for name, dw in algebra.lora_update(model).items():
        assert torch.equal(dw, update[name]) and dw.norm() > 1
    algebra.regauge(model, 0.3)
    for name, dw in algebra.lora_update(model).items():
        torch.testing.assert_close(dw, update[name])


@pytest.mark.slow
def test_algebra_from_beginning_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of one step on the toy tasks already obey the laws of the results."""
    read_data = train_glue.read_data

    def few(args: Any) -> Any:
        train, test, source = read_data(args)
        return train[:100], test[:20], source

    monkeypatch.setattr(train_glue, "read_data", few)
    short = ["--max-steps", "1", "--max-length", "16"]
    monkeypatch.setattr(glue_table, "BUDGET", dict.fromkeys(glue_table.BUDGET, short))
    command = glue_table.command  # but for bf16, which is slow where a CPU lacks it

    def float32(*one: Any) -> list[str]:
        return [word for word in command(*one) if word != "--bf16"]

    monkeypatch.setattr(glue_table, "command", float32)
    monkeypatch.setattr(glue_table, "best_rate", {"gpart": 0.01, "lora": 0.01}.get)
    monkeypatch.setattr(glue_table, "dev", lambda task, method, rate, d: -rate)
    monkeypatch.setattr(algebra, "HERE", tmp_path)
    monkeypatch.setattr(algebra, "STEPS", 1)
    (tmp_path / "results").mkdir()
    argv = ["algebra", "--data-dir", str(ROOT / "toy_glue"), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    algebra.main()
    cells = json.loads(read(tmp_path / "results" / "algebra.json"))["cells"]
    found = {name: cell["found"] for name, cell in cells.items()}
    assert len(found["geometry"]["gpart"]) == len(found["geometry"]["lora"]) == 6
    for pair in found["geometry"]["gpart"].values():
        assert pair["coordinates"] == pytest.approx(pair["update"], rel=1e-6, abs=1e-6)
    for pair in found["geometry"]["lora"].values():
        assert pair["coordinates"]["distance"] > 2 * pair["update"]["distance"] > 0
    for rows in found["project"].values():
        for row in [row for row in rows.values() if "sqrt(d/N)" in row]:
            assert 0 < row["norm"] < 0.6
        assert rows["d = 1,440"]["norm"] < rows["d = 368,640"]["norm"]
    assert found["nest"]["update changed by"] < 1e-6
    assert found["nest"]["embedded"] == pytest.approx(found["nest"]["before"], abs=0.02)
    gauge = found["gauge"]
    assert gauge["c = 10"]["factors"]["distance"] > 1
    assert gauge["c = 10"]["update"]["distance"] < 1e-5 * gauge["norms"]["update"]
    monkeypatch.setattr(algebra, "PARTS", dict.fromkeys(algebra.PARTS))
    algebra.main()  # runs nothing again
    assert "## Gauge" in read(tmp_path / "results" / "algebra.md")


def test_updates_combine_linearly() -> None:
    """combine sums what it is given, and a vector has every entry once."""
    a = {"u": torch.ones(2, 2), "v": torch.zeros(3)}
    b = {"u": torch.full((2, 2), 2.0), "v": torch.ones(3)}
    total = algebra.vector(algebra.combine((0.5, a), (-1.0, b)))
    assert torch.equal(total, torch.tensor([-1.5] * 4 + [-1.0] * 3).double())
    result = algebra.compare(algebra.vector(a), algebra.vector(b))
    assert result == pytest.approx({"distance": 7**0.5, "cosine": 8 / (4 * 19) ** 0.5})


# --- Evidence ---
def test_a_name_has_all_that_varies() -> None:
    """Other cells have other names and commands, and a command asks for its cell."""
    base = evidence.Cell("stsb", "gpart", 0.015, 10, 23040, 0.1)
    others = [base._replace(task="sst2"), base._replace(method="gpart-noniso")]
    others += [base._replace(lr=0.0150001), base._replace(seed=1)]
    others += [base._replace(d=360), base._replace(decay=0.0)]
    cells = [base, *others]
    assert len({cell.path for cell in cells}) == len(cells)
    for cell in cells:
        asked = train_glue.parser().parse_args(cell.command)
        found = (asked.task, asked.method, asked.lr, asked.seeds, asked.d)
        assert found == (cell.task, cell.method, cell.lr, [cell.seed], cell.d)
        assert (asked.weight_decay, asked.partition_seed) == (cell.decay, cell.seed)
    assert len({" ".join(cell.command) for cell in cells}) == len(cells)
    assert "-p10-seed10" in base.path.name and "-p01-seed01" in others[3].path.name


def test_every_result_is_of_the_run_that_its_name_says() -> None:
    """Settings, command and commit; a loss unless it diverged."""
    pattern = r"(\w+?)-(.+)-d(\d+)-lr(.+)-wd(.+)-p(\d\d)-seed(\d\d)"
    for path in evidence.CELLS.glob("*.json"):
        found = re.fullmatch(pattern, path.stem)
        task, method, d, lr, decay, part, seed = found.groups()
        assert part == seed
        cell = evidence.Cell(task, method, float(lr), int(seed), int(d), float(decay))
        result = json.loads(read(path))
        ran = result["command"]
        if method == "c3a":  # a seed that it ignores was not yet refused then
            ran = ran.replace(f" --partition-seed {cell.seed}", "")
        assert cell.path == path and ran == " ".join(cell.command)
        assert re.fullmatch("[0-9a-f]{40}", result["commit"])
        if result["metric"] is not None:
            asked = vars(train_glue.parser().parse_args(cell.command))
            found = result["settings"]
            for key in ("task", "method", "d", "lr", "weight_decay"):
                assert found[key] == asked[key], (path.stem, key)
            # C3A draws nothing, and is not told a seed
            assert found["partition_seed"] == (0 if method == "c3a" else cell.seed)
            assert found["seeds"] == [cell.seed] and result["loss"] > 0


def test_rate_sum_is_that_of_the_schedule() -> None:
    """transformers' own, warmup included."""
    for steps in (240, 150, 17):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        linear, warmup = transformers.get_linear_schedule_with_warmup, 0.06 * steps
        schedule = linear(optimizer, round(warmup), steps)
        total = 0.0
        for _ in range(steps):
            total += optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
        assert evidence.rate_sum(steps, 0.01) == pytest.approx(total)


def test_three_doses_are_three_things(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both variants take the same steps in weight space; one has the same wd and so a
    smaller dose, the other the same dose. At dose 0 they are one run."""
    monkeypatch.setattr(evidence, "best_rate", lambda *_: 0.015)
    cells = [evidence.dosed("stsb", 3.0, k, 10) for k in ("gpart", "same", "scaled")]
    gpart_, same, scaled = cells
    shrink = (glue_table.D / glue_table.N) ** 0.5
    assert same.lr == scaled.lr == pytest.approx(gpart_.lr * shrink, rel=1e-3)
    assert same.decay == gpart_.decay
    sums = [evidence.rate_sum(240, cell.lr) * cell.decay for cell in cells]
    assert sums == pytest.approx([3.0, 3.0 * shrink, 3.0], rel=2e-3)
    zero = [evidence.dosed("stsb", 0.0, k, 10) for k in ("gpart", "same", "scaled")]
    assert zero[1] == zero[2] != zero[0]


def test_measured_loss_is_the_models_own() -> None:
    """For a score and for classes: the mean over all rows, of batches of any size."""
    for task in ("stsb", "mrpc"):
        command = ["--task", task, "--method", "full", "--max-length", "32"]
        args = train_glue.parser().parse_args(command)
        toy = {"task": task, "data_dir": str(ROOT / "toy_glue"), "paper": False}
        rows, _, _ = train_glue.read_data(argparse.Namespace(**toy))
        rows = rows[:70]  # one batch of 64, and 6
        model = train_glue.build(args, 0).eval()
        path = train_glue.model_path(args.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        accelerator = accelerate.Accelerator(cpu=True)
        spec = train_glue.TASKS[task]
        bench = train_glue.Bench(args, spec, tokenizer, accelerator)
        with torch.no_grad():
            expected = model(**bench.encode(rows)).loss
        metric, loss = bench.measure(model, rows)
        torch.testing.assert_close(torch.tensor(loss), expected)
        assert metric == bench.evaluate(model, rows)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """put(cell, dev, metric, loss): a finished run, in a folder of its own."""
    monkeypatch.setattr(evidence, "CELLS", tmp_path)

    def put(
        cell: evidence.Cell, dev: float | None, metric: float = 0.0, loss: float = 0.0
    ) -> None:
        diverged = {"dev": None, "metric": None, "loss": None}
        found = {"dev": dev, "metric": metric, "loss": loss, "trainable": 7}
        text = json.dumps(diverged if dev is None else found)
        cell.path.write_text(text, encoding="utf-8")

    return put


def test_rates_go_on_around_the_best(ran: Any) -> None:
    """A factor sqrt(3) from the best of five, 3 from an only one; known at the end."""
    low, best, high = sorted(evidence.rates("sst2", "unilora"))[-5:-2]
    assert (best / low, high / best) == pytest.approx([3**0.5] * 2, rel=1e-3)
    assert best == 0.005  # of five that results/glue/ has
    one, more, less = evidence.rates("mrpc", "gpart")
    assert (more / one, one / less) == (3, 3)
    if not evidence.Cell("mrpc", "gpart", more).path.exists():
        with pytest.raises(ValueError, match="gpart on mrpc, d = 23040, are not all"):
            evidence.best_rate("mrpc", "gpart")
    ran(evidence.Cell("mrpc", "gpart", more), 0.8)
    ran(evidence.Cell("mrpc", "gpart", less), 0.9)
    assert evidence.best_rate("mrpc", "gpart") == less


def test_rates_go_on_while_the_largest_is_the_best(ran: Any) -> None:
    """By threes, once all of them have run: for another d, and in every search."""

    def rates() -> list[float]:
        return evidence.rates("sst2", "unilora", 1440)

    known = rates()
    assert known == [0.00167, 0.0067, 0.02, 0.06]
    for dev, rate in zip((0.91, 0.92, 0.93), known[1:], strict=True):
        assert rates() == known  # results/glue/ has the first
        ran(evidence.Cell("sst2", "unilora", rate, d=1440), dev)
    assert rates() == [*known, 0.18]
    ran(evidence.Cell("sst2", "unilora", 0.18, d=1440), 0.94)
    assert rates() == [*known, 0.18, 0.54]
    ran(evidence.Cell("sst2", "unilora", 0.54, d=1440), None)
    assert rates() == [*known, 0.18, 0.54]
    assert evidence.best_rate("sst2", "unilora", 1440) == 0.18
    five = evidence.rates("sst2", "c3a")
    for rate in five:
        ran(evidence.Cell("sst2", "c3a", rate), rate)
    assert evidence.rates("sst2", "c3a") == [*five, 5.94]
    one, more, less = evidence.rates("mrpc", "gpart")
    ran(evidence.Cell("mrpc", "gpart", more), 0.9)
    ran(evidence.Cell("mrpc", "gpart", less), 0.8)
    assert evidence.rates("mrpc", "gpart") == [one, more, less, 0.135]


def test_best_rate_of_a_search(ran: Any) -> None:
    """The smaller of equals; one that diverged is worst; None while one is missing."""
    cells = [evidence.Cell("sst2", "c3a", rate) for rate in (0.3, 0.1, 0.2)]
    ran(cells[0], 0.5)
    ran(cells[1], 0.5)
    assert evidence.best_of(cells) is None and evidence.best_of([]) is None
    ran(cells[2], None)
    assert evidence.best_of(cells) == 0.1
    assert evidence.best_of(cells[2:]) == 0.2


def test_pairs_are_of_the_devices_that_the_report_names() -> None:
    """GPart and Uni-LoRA of one; Uni-LoRA without decay and the methods that share
    nothing ran on the CPU, what they are compared with on the GPU."""

    def device(cell: evidence.Cell) -> str:
        return cell.read()["device"]

    sizes = [(23040, evidence.PAIRED), *((d, evidence.THREE) for d in (360, 5760))]
    for task in ("stsb", "mrpc", "sst2"):
        for d, seeds in sizes if task != "mrpc" else sizes[:1]:
            for one, other in zip(*verdicts.pair(task, d, seeds), strict=True):
                assert device(one) == device(other), (one, other)
    undecayed = evidence.undecayed("stsb")
    cpu, gpu = [*undecayed], [cell._replace(decay=0.1) for cell in undecayed]
    for task in ("stsb", "sst2"):
        for method in ("gpart", *evidence.ISOMETRIC):
            rate = evidence.best_rate(task, method)
            cells = [evidence.Cell(task, method, rate, s) for s in evidence.THREE]
            (gpu if method == "gpart" else cpu).extend(cells)
    assert all("CPU" in device(cell) for cell in cpu)
    assert all("NVIDIA" in device(cell) for cell in gpu)


def test_a_stop_leaves_whole_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed's runs follow one another, and no seed chose a rate."""
    monkeypatch.setattr(evidence, "best_rate", lambda *_: 0.1)
    cells = evidence.equal(("stsb", "mrpc"))
    for at in range(0, len(cells), 2):
        one, other = cells[at : at + 2]
        assert one._replace(method="unilora") == other and one.method == "gpart"
    assert [cell.seed for cell in cells] == [s for s in evidence.PAIRED for _ in "1234"]
    assert min(evidence.PAIRED) > 2 and len({*evidence.PAIRED}) == 10


def test_a_stage_without_its_rates_holds_up_nothing(
    ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is in the stages' order, once, until it has a result."""
    a, b = (evidence.Cell("sst2", "c3a", rate) for rate in (0.1, 0.2))

    def unknown() -> list[evidence.Cell]:
        raise ValueError

    monkeypatch.setattr(evidence, "STAGES", [unknown, lambda: [b], lambda: [a, b]])
    assert evidence.waiting() == [b, a]
    ran(b, None)
    assert evidence.waiting() == [a]


def test_interval_is_students() -> None:
    """scipy's own; of equal values it is a point, of one value there is none."""
    values = [1.0, 2.0, 4.5, 3.0]
    found = verdicts.interval(values)
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found is not None and found.n == 4
    assert found.mean == statistics.fmean(values)
    assert (found.low, found.high) == pytest.approx([*expected])
    assert verdicts.interval([2.0, 2.0]) == (2.0, 2.0, 2.0, 2)
    assert verdicts.interval([2.0]) is None


def test_a_verdict_needs_the_whole_interval() -> None:
    """Of a loss the other way round."""
    up, down = (verdicts.Interval(m, m - 1, m + 1, 9) for m in (1.5, -1.5))
    assert (up.verdict(), down.verdict()) == ("better", "worse")
    assert (up.verdict(-1), down.verdict(-1)) == ("worse", "better")
    assert verdicts.Interval(0.5, -0.1, 1.1, 9).verdict() == "not told apart"


def test_differences_pair_the_seeds(ran: Any) -> None:
    """A hole leaves a hole; a run that diverged has the metric 0 and no loss."""
    ones = [evidence.Cell("stsb", "gpart", 0.1, seed) for seed in (10, 11, 12)]
    others = [cell._replace(method="unilora") for cell in ones]
    for cell, metric in zip(ones, (0.5, 0.75, 0.25), strict=True):
        ran(cell, 0.5, metric, 0.5)
    ran(others[0], 0.5, 0.25, 0.25)
    ran(others[2], None)
    assert verdicts.differences(ones, others, "metric") == {10: 25.0, 12: 25.0}
    assert verdicts.differences(ones, others, "loss") == {10: 250.0}
    assert verdicts.paired(ones, others, "loss") is None


def test_optimum_is_the_top_of_a_parabola() -> None:
    """Of metrics that are one in the logarithm of the rate, exactly; none at an end."""
    rates = [0.001, 0.004, 0.01, 0.05]
    points = [(r, 0.8 - math.log(r / 0.006) ** 2) for r in rates]
    assert verdicts.optimum(points) == pytest.approx(0.006)
    assert verdicts.optimum(points[:2]) is None and verdicts.optimum([]) is None


def test_slope_is_the_exponent() -> None:
    """Exactly of a power law, and within the interval of a noisy one."""
    sizes = [360, 5760, 23040, 92160]
    line = verdicts.slope({d: 3 * d**-0.5 for d in sizes})
    assert line is not None and (line.low, line.high) == pytest.approx([-0.5] * 2)
    noisy = verdicts.slope({d: d**-0.5 * 2 ** (d % 7) for d in sizes})
    assert noisy is not None and noisy.low < -0.5 < noisy.high
    assert verdicts.slope(dict.fromkeys(sizes[:2], 1.0)) is None


def test_paper_dose_counts_its_rows() -> None:
    """The rows that are left to train on are those of the results."""
    for task in ("mrpc", "stsb"):
        path = glue_table.cell(task, "gpart", 0.015, 0)
        rows = json.loads(read(path))["rows"]["train"]
        assert verdicts.PAPER[task][0] == rows


def test_evidence_md_is_of_the_runs() -> None:
    """The whole page is what the script makes of the files."""
    assert read(RESULTS / "evidence.md") == verdicts.render()


INTERVAL = re.compile(r"([+-]\d[\d.]*) \[([+-]\d[\d.]*), ([+-]\d[\d.]*)\]")


def test_report_has_the_tables_and_intervals_of_the_evidence() -> None:
    """Every row and every interval in its section, and in the rows on top that point
    to it, stands in evidence.md, if to fewer digits; that of a gain may be turned."""
    page, link = read(RESULTS / "evidence.md"), "tuned-rivals-small-d-the-papers-dose"
    section = REPORT.partition("\n## Tuned rivals")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line[:2] == "| "]
    assert len(rows) > 40 and set(rows) <= set(page.splitlines())
    known = [[*map(float, found)] for found in INTERVAL.findall(page)]
    known += [[-mean, -high, -low] for mean, low, high in known]
    top = [line for line in REPORT.splitlines() if f"](#{link}) |" in line]
    quotes = INTERVAL.findall(" ".join([*top, *section.split()]))
    assert len(top) > 4 and len(quotes) > 60
    for quote in quotes:
        values, digits = [*map(float, quote)], len(quote[0].partition(".")[2])
        within = 0.5 / 10**digits + 0.005 + 1e-9  # evidence.md is rounded too
        assert any(values == pytest.approx(one, abs=within) for one in known), quote


def test_readme_has_the_verdicts_of_the_evidence() -> None:
    """Equal d, isometry at the paper's doses, and how the best rate goes with d."""
    readme = " ".join(read(ROOT / "README.md").split())
    equal = verdicts.paired(*verdicts.pair("stsb", 23040, evidence.PAIRED), "metric")
    assert f"STS-B: {equal.mean:+.1f} points, 95 % interval " in readme
    assert f"{equal.low:+.1f} to {equal.high:+.1f}, ten seeds" in readme
    for task, dose, text in (
        ("stsb", 3.0, "STS-B {} points"),
        ("mrpc", 1.0, "MRPC {}"),
    ):
        one, other = (
            [evidence.dosed(task, dose, kind, seed) for seed in evidence.THREE]
            for kind in ("gpart", "same")
        )
        found = verdicts.paired(one, other, "metric")
        start = text.format(f"{found.mean:+.1f}")
        assert f"{start}, {found.low:+.1f} to {found.high:+.1f}" in readme
    for task, text in (("stsb", "STS-B"), ("sst2", "SST-2")):
        tops = {d: top for d, (top, _) in verdicts.optima(task, "gpart").items()}
        line = verdicts.slope(tops)
        assert (
            f"{line.mean:.2f} ({line.low:.2f} to {line.high:.2f}) on {text}" in readme
        )
    won, of = dimension.scaled_wins()
    assert f"beat one rate for all at {won} of {of} points" in readme


def test_report_has_the_factors_of_the_rule() -> None:
    """lr sqrt(d/d') over GPart's top: in its table, at the ends, and the largest for a
    factor of 4 in d."""
    factors, rows = {}, verdicts.rule_table().splitlines()[2:]
    for task, row in zip(("stsb", "sst2"), rows, strict=True):
        tops = {d: top for d, (top, _) in verdicts.optima(task, "gpart").items()}
        start = tops[glue_table.D] * glue_table.D**0.5
        factors[task] = {d: start / d**0.5 / top for d, top in tops.items()}
        assert row.split("|")[2:-1] == [
            f" {factors[task][d]:.2f} " if d in tops else "  " for d in verdicts.SIZES
        ]
    one, two = factors.values()
    near = [max(max(f[d], 1 / f[d]) for d in (5760, 92160)) for f in (one, two)]
    end = {f"{f[glue_table.N]:.1f} times too large at N on both" for f in (one, two)}
    for quote in (
        f"within a factor of {near[0]:.2f} (STS-B) and {near[1]:.1f} (SST-2)",
        f"{1 / one[360]:.1f} and {1 / two[360]:.1f} times too small at 360",
        *end,
    ):
        assert quote in SENTENCES


# --- Isometry ---
def test_ratio_tells_isometry_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 for GPart and SHiRA, sqrt(N/d) at every pair for the variant, and for LoRA
    another for thetas of another length."""
    monkeypatch.setattr(isometry, "TARGETS", ["0", "1"])
    monkeypatch.setattr(glue_table, "D", 32)
    expected = {"gpart": 1.0, "shira": 1.0, "gpart-noniso": (128 / 32) ** 0.5}
    for name in (*expected, "lora"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        method = isometry.Map(model, name)
        theta = torch.randn(method.size, generator=torch.Generator().manual_seed(1))
        assert method(theta).shape == (128,)
        found = isometry.ratios(method, 20, 10.0)
        if name in expected:
            assert found == pytest.approx([expected[name]] * 20)
        else:
            assert max(found) > 5 * min(found)


def test_a_random_partition_keeps_the_mean_and_d_of_N() -> None:
    """E |P^T x|^2 = N mean(x)^2 + (d-1)/(N-1) |x - mean(x)|^2 over partitions into
    equal groups, to four standard errors."""
    N, d = 24, 6
    x = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x += 0.3
    squares = torch.stack(
        [gpart.Partition(N, d, seed).reduce(x).square().sum() for seed in range(600)]
    )
    expected = N * x.mean() ** 2 + (d - 1) / (N - 1) * (x - x.mean()).square().sum()
    error = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - expected) < 4 * error < 0.2 * expected


def test_adamw_knows_no_isometry() -> None:
    """phi = theta / sqrt(n): with lr / sqrt(n), wd sqrt(n) and eps sqrt(n) the variant
    without isometry makes the same updates, step by step, whatever the loss."""
    N, d = 24, 6
    n = N // d
    target = torch.randn(N, dtype=torch.float64)
    updates: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for isometric, path in updates.items():
        P = gpart.Partition(N, d, 3, isometric).dense()
        theta = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
        root = 1.0 if isometric else n**0.5
        settings = {"lr": 0.1 / root, "weight_decay": 2.0 * root, "eps": 1e-8 * root}
        optimizer = torch.optim.AdamW([theta], **settings)
        for _ in range(30):
            optimizer.zero_grad()
            (P @ theta - target).pow(4).sum().backward()
            optimizer.step()
            path.append((P @ theta).detach())
    torch.testing.assert_close(torch.stack(updates[True]), torch.stack(updates[False]))
    assert updates[True][-1].norm() > 0.1


def test_a_norm_falls_as_decay_or_its_root() -> None:
    """Under AdamW theta settles at a norm that falls as 1/wd where the gradient is
    steady, and as 1/sqrt(wd) where it is noise: to be sqrt(n) times nearer takes
    sqrt(n) or n times the decay."""
    draw = torch.Generator().manual_seed(0)
    norms = {}
    for kind in ("steady", "noise"):
        for wd in (0.25, 4.0):
            theta = torch.nn.Parameter(torch.zeros(1000))
            optimizer = torch.optim.AdamW([theta], lr=0.005, weight_decay=wd)
            for _ in range(4000):
                noise = torch.randn(1000, generator=draw)
                theta.grad = torch.ones(1000) if kind == "steady" else noise
                optimizer.step()
            norms[kind, wd] = float(theta.detach().norm())
    assert norms["steady", 0.25] / norms["steady", 4.0] == pytest.approx(16, rel=0.02)
    assert norms["noise", 0.25] / norms["noise", 4.0] == pytest.approx(4, rel=0.1)
