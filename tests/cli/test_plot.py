import csv
from pathlib import Path

import numpy as np
import pytest
from loops import fit
from matplotlib.colors import to_rgb
from PIL import Image
from problems import Quadratic
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from bilevel_lightning import RHG
from bilevel_lightning.cli import plot
from bilevel_lightning.cli.plot import COLOURS, PANELS, Run, draw, folders, load, mean, read

START = 1000.0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Paths are relative to an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def write(folder, scalars, upper_iterations=1):
    """Logs ``{tag: {step: value}}``, the events of step k 10 k + 3 seconds after the log was opened."""
    with SummaryWriter(folder) as writer:
        for tag, values in scalars.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step, walltime=START + 10 * step + 3)
    (Path(folder) / "hparams.yaml").write_text(
        f"lower_steps: 7\nupper_iterations: {upper_iterations}\nwarm_start: true\n"
    )
    return folder


def run_of(folder, values, tag="train/upper_loss", **settings):
    """Logs values and what an iteration takes: 7 oracle calls, 3 values of a loss, 70 samples."""
    steps = range(len(values))
    per_step = {"lower_gradients": 4, "hessian_products": 2, "upper_gradients": 1, "lower_values": 3, "samples": 70}
    counts = {f"oracle/{name}": {k: n * (k + 1) for k in steps} for name, n in per_step.items()}
    return write(folder, {tag: dict(enumerate(values)), **counts}, **settings)


def curve(folder, y="train/upper_loss"):
    return read(load(Path(folder)), y)


def run(capsys, *args):
    """Returns the exit status, what was printed, and the lines of errors."""
    status = 0
    try:
        plot([*args])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, " ".join(out.split()), [line for line in err.splitlines() if line]


@pytest.mark.parametrize("upper_iterations", [1, 3])
def test_what_a_run_logged_is_read_back(upper_iterations):
    loggers = [TensorBoardLogger(".", "tb", "version_0"), CSVLogger(".", "csv", "0")]
    module = RHG(task=Quadratic(), lower_steps=5, upper_iterations=upper_iterations)
    fit(module, 6 * upper_iterations, logger=loggers)
    with Path("csv/0/metrics.csv").open() as file:
        logged = [float(row["train/upper_loss"]) for row in csv.DictReader(file)]
    found = curve("tb/version_0")
    assert len(logged) == 6
    np.testing.assert_allclose(found.values, logged, rtol=1e-6)
    iterations = upper_iterations * np.arange(1, 7)
    assert found.axes["iterations"].tolist() == iterations.tolist()
    assert found.axes["oracles"].tolist() == (16 * iterations).tolist()
    assert (np.diff(found.axes["seconds"]) > 0).all()
    assert 0 < found.axes["seconds"][0] < 600


def test_counts_of_values_that_are_logged_more_rarely_or_later():
    run_of("a", [3.0, 2.0, 1.0, 0.5])
    write(
        "b",
        {"val/upper_loss": {1: 5.0, 3: 4.0}, "oracle/lower_gradients": {0: 1, 1: 2, 2: 3}, "oracle/x_maps": {2: 10}},
    )
    found = curve("b", "val/upper_loss")
    assert found.axes["iterations"].tolist() == [2, 4]
    assert found.axes["oracles"].tolist() == [2, 13]
    assert "samples" not in found.axes
    assert curve("a").axes["oracles"].tolist() == [7, 14, 21, 28]
    assert curve("a").axes["samples"].tolist() == [70, 140, 210, 280]


def test_seconds_are_those_logged_or_those_of_the_clock():
    with SummaryWriter("clock") as writer:
        for step in range(3):
            writer.add_scalar("train/upper_loss", 1.0, step, walltime=START + 10 * step + 3)
    events = load(Path("clock"))
    events._first_event_timestamp = START
    assert read(events, "train/upper_loss").axes["seconds"].tolist() == [3, 13, 23]
    write("own", {"train/upper_loss": {0: 1.0, 1: 1.0}, "train/seconds": {0: 0.25, 1: 0.75}})
    assert curve("own").axes["seconds"].tolist() == [0.25, 0.75]


def test_a_run_is_a_folder_its_newest_version_or_a_glob():
    for version in (0, 2, 10):
        run_of(f"runs/a/version_{version}", [1.0])
    Path("runs/a/version_11").mkdir()  # nothing logged, as by bilevel-fit predict
    assert folders("runs/a") == [Path("runs/a/version_10")]
    assert folders("runs/a/version_2") == [Path("runs/a/version_2")]
    assert folders("runs/a/version_[02]") == [Path("runs/a/version_0"), Path("runs/a/version_2")]
    assert len(folders(str(Path("runs/a/version_?").absolute()))) == 2


def seeds():
    values = [[4.0, 2.0, 1.0, 0.5], [2.0, 6.0, 3.0], [3.0, 1.0, 5.0, 7.0]]
    return Run("three", [curve(run_of(f"s/version_{i}", v)) for i, v in enumerate(values)])


def test_seeds_have_a_mean_and_a_range_where_all_have_a_value():
    three = seeds()
    x, middle, low, high = mean(three, "oracles")
    assert x.tolist() == [7, 14, 21]
    np.testing.assert_allclose(middle, [3, 3, 3])
    assert low.tolist() == [2, 1, 1]
    assert high.tolist() == [4, 6, 5]
    other = Run("one", [curve(run_of("o", [1.0, 1.0]))])
    figure = draw([three, other], "train/upper_loss", PANELS["all"])
    for axes, label in zip(figure.axes, ("upper iterations", "oracle calls", "time in seconds"), strict=True):
        assert label in axes.get_xlabel()
        (band,) = axes.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (1, 6)
        assert axes.get_yscale() == "log"
        assert {line.get_linestyle() for line in axes.lines} == {"-", "--"}
    assert figure.axes[0].get_ylabel() == "train/upper_loss"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["three, 3 seeds", "one"]


def test_scales():
    positive, mixed = (Run(name, [curve(run_of(name, v))]) for name, v in (("p", [2.0, 1.0]), ("m", [1.0, -1.0])))
    long = Run("long", [curve(run_of("long", [1.0] * 100))])

    def scales(runs, y="train/upper_loss", **settings):
        (axes,) = draw(runs, y, ["oracles"], **settings).axes
        return axes.get_xscale(), axes.get_yscale()

    assert scales([positive]) == ("linear", "log")
    assert scales([positive, mixed]) == ("linear", "linear")
    assert scales([positive], log=False) == ("linear", "linear")
    assert scales([positive, mixed], log=True) == ("linear", "log")
    assert scales([positive], "val/accuracy") == ("linear", "linear")
    assert scales([positive, long]) == ("log", "log")  # 100 iterations beside 2


def test_the_picture_and_the_table(capsys):
    run_of("runs/first/version_0", [4.0, 0.25, 0.5])
    run_of("runs/second/version_3", [9.0] * 200)
    status, out, err = run(capsys, "runs/first", "runs/second/version_3", "--output", "both.png")
    assert (status, err) == (0, [])
    assert "train/upper_loss ┏" in out
    assert "│ first │ 0.5 │ 0.25 │ 3 │ 21 │" in out
    assert "│ second │ 9 │ 9 │ 200 │ 1,400 │" in out
    assert out.endswith("Picture: both.png")
    with Image.open("both.png") as picture:
        assert picture.width == 1800
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    for colour in COLOURS[:2]:
        assert tuple(round(255 * c) for c in to_rgb(colour)) in colours


def test_labels_seeds_and_higher_is_better(capsys):
    for version, values in enumerate(([0.5, 0.9, 0.8], [0.5, 0.7, 0.6])):
        run_of(f"runs/a/version_{version}", values, "val/accuracy")
    args = ["--y", "val/accuracy", "--x", "samples", "--output", "x.svg"]
    _, out, _ = run(capsys, "runs/a/version_*", "runs/a/version_1", *args, "--labels", "both [b]", "one")
    assert "highest" in out
    assert "│ both [b] │ 0.7 │ 0.8 │ 3 │ 21 │" in out
    assert "│ 2 seeds: mean, range │ 0.6 to 0.8 │ 0.7 to 0.9 │" in out
    assert "│ one │ 0.6 │ 0.7 │" in out
    assert Path("x.svg").stat().st_size > 5000
    _, out, _ = run(capsys, "runs/a/version_0", "runs/a/version_1", *args)
    assert "│ runs/a/version_0 │" in out  # the config's name would not tell them apart


def test_by_default_the_error_of_x_where_all_know_it(capsys):
    for name, tags in (("a", ("train/upper_loss", "train/error_x")), ("b", ("train/upper_loss",))):
        write(name, {tag: {0: 1.0} for tag in (*tags, "oracle/lower_gradients")})
    assert run(capsys, "a")[1].startswith("train/error_x")
    assert run(capsys, "a", "b")[1].startswith("train/upper_loss")


def test_divergence_is_said(capsys):
    run_of("bad", [3.0, 2.0, float("inf"), float("nan")], upper_iterations=5)
    _, out, _ = run(capsys, "bad")
    assert "│ bad │ nan │ 2 │ 20 │" in out
    assert "bad: not finite from iteration 15" in out
    figure = draw([Run("bad", [curve("bad")])], "train/upper_loss", ["iterations"])
    assert figure.legends[0].get_texts()[0].get_text() == "bad (diverged)"
    assert figure.axes[0].get_yscale() == "log"  # what is finite is positive
    cross = figure.axes[0].lines[-1]
    assert (cross.get_xdata().tolist(), cross.get_ydata().tolist()) == ([10], [2])
    run_of("worse/version_0", [float("nan")] * 2)
    run_of("worse/version_1", [1.0, 1.0])
    _, out, _ = run(capsys, "worse/version_*")
    assert "not finite from iteration 1 (1 of 2 seeds)" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: runs"),
        (["nothing"], "nothing does not exist. A run's folder is runs/<config>/version_<n>."),
        (["no*thing"], "no*thing does not exist."),
        (["empty"], "empty holds neither TensorBoard's event files nor a version_<n> that does."),
        (["a", "--y", "train/los"], "--y train/los is not logged in a; it has train/upper_loss."),
        (["a", "--x", "oracles"], "--x oracles is not logged by a; --x iterations and --x seconds always are."),
        (["a", "--x", "steps"], "invalid choice: 'steps'"),
        (["a", "--labels", "one", "two"], "--labels has 2 labels for 1 runs"),
        (["a", "--log", "--linear"], "not allowed with argument"),
        (["a", "--x", "seconds", "--log"], "--log: train/upper_loss is nowhere positive."),
        (["[ab]", "--x", "seconds"], "The seeds of a have logged no iteration in common: give them one by one."),
        (["a", "--output", "picture.doc"], "--output picture.doc must end in .png, .pdf or .svg."),
        (["a", "--x", "seconds", "--output", "no/a.png"], "Cannot write --output no/a.png: No such file or directory."),
        (["a", "--z"], "--z"),
    ],
)
def test_mistakes_end_in_one_line_with_status_2(capsys, args, message):
    write("a", {"train/upper_loss": {0: -1.0}})
    write("b", {"train/upper_loss": {1: -1.0}})
    Path("empty").mkdir()
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert len(err) == 1
    assert err[0].startswith("bilevel-plot: error: ")
    assert message in err[0]


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert out.startswith("usage: bilevel-plot RUN [RUN ...] [options]")
    assert "One gradient, one product with second derivatives" in out
    assert "minimum and maximum" in out
