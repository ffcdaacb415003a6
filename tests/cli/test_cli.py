import csv
import re
import subprocess
import sys
from pathlib import Path

import files
import pytest
import torch
import yaml
from pytorch_lightning import Trainer

from bilevel_lightning import RHG, BilevelError
from bilevel_lightning.cli import fit, shipped_configs
from bilevel_lightning.cli.arguments import complete, config_path
from bilevel_lightning.models import Genotype
from bilevel_lightning.tasks import HyperCleaning

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
QUICK = [
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
    "--trainer.accelerator",
    "cpu",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs are written below the working folder."""
    monkeypatch.chdir(tmp_path)


def run(*args):
    fit([*args, *QUICK])


def failure(capsys, *args):
    """Returns the one line that a wrong call ends in."""
    with pytest.raises(SystemExit) as end:
        run(*args)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Seed set")]
    assert len(lines) == 1
    assert lines[0].startswith("bilevel-fit: error: ")
    return lines[0]


def checkpoint(folder="runs"):
    (path,) = Path(folder).rglob("*.ckpt")
    return path


# Every shipped config, two iterations on tiny data.


def of_task(task):
    return [name for name in shipped_configs() if name.startswith(f"{task}/")]


def test_every_shipped_config_is_run_here():
    tasks = ("equilibrium", "few_shot", "hyper_cleaning", "nas", "numerical", "poisoning", "reweighting", "selection")
    assert sorted(name for task in tasks for name in of_task(task)) == shipped_configs()


@pytest.mark.parametrize("name", of_task("numerical"))
def test_shipped_numerical_configs_run(name):
    run("--config", name, "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--model.upper_iterations=1")
    folder = Path("runs") / name / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/upper_loss"]]) == 2
    with (folder / "ends.csv").open() as file:
        assert list(csv.DictReader(file))
    text = Path(config_path(name)).read_text()
    assert "precision: 64-true" in text  # the numbers of docs/numerical.md are those of float64


LOOPLESS = ("bamm", "fsla", "gpbgd", "masoba", "mrbo", "saba", "soba", "srba", "sustain")


@pytest.mark.parametrize("name", of_task("hyper_cleaning"))
def test_shipped_cleaning_configs_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(tmp_path))
    files.mnist(tmp_path)
    files.mnist(tmp_path, "FashionMNIST")
    files.cifar_folders(tmp_path, train=120)
    text, overlay = Path(config_path(name)).read_text(), TINY.read_text()
    small = ["--data.lower_batch_size=16", "--data.upper_batch_size=16"] if "batch_size" in text else []
    if "class_path: TRHG" not in text:
        overlay = overlay.replace("    truncation: 3\n", "")
    if set(name.split("_")) & set(LOOPLESS):
        overlay = overlay.replace("    lower_steps: 5\n", "")
    Path("tiny.yaml").write_text(overlay)
    run("--config", name, "--config", "tiny.yaml", *small)
    folder = Path("runs") / name / "version_0"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 2
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/upper_loss"]]) == 2
    assert [row for row in rows if row["report/learnt_weights"]]
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "suspicious_images.png").stat().st_size > 1000


@pytest.mark.parametrize("name", of_task("poisoning"))
def test_shipped_poisoning_configs_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(tmp_path))
    files.mnist(tmp_path)
    files.cifar_folders(tmp_path, train=120)
    text = Path(config_path(name)).read_text()
    small = ["--model.lower_steps=3", "--trainer.max_steps=2", "--data.epoch_length=1"]
    if "digits" not in name:
        small += ["--model.task.samples=18", "--data.samples=120"]
    if "lower_batch_size" in text:
        small += ["--data.lower_batch_size=16"]
    if "truncation" in text:
        small += ["--model.truncation=2"]
    if "GradientFlow" not in text:  # whose report is quick as it stands
        small += ["--trainer.callbacks=PoisoningReport", "--trainer.callbacks.steps=2"]
    run("--config", name, *small)
    folder = Path("runs") / name / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/upper_loss"]]) == 2
    assert [row for row in rows if row["report/random_noise/test_accuracy"]]
    assert float(rows[-1]["report/poisoned_images/norm"]) > 0
    assert (folder / "poisoned_images.png").stat().st_size > 1000
    assert "What training on the poisoned images costs" in capsys.readouterr().out
    (path,) = folder.rglob("*.ckpt")
    run("predict", "--ckpt_path", str(path), "--trainer.default_root_dir", "predicted")
    (table,) = Path("predicted").rglob("predictions.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "predicted_clean", "predicted", "norm"]
    assert any(float(row["norm"]) > 0 for row in rows)


@pytest.mark.data
@pytest.mark.slow
def test_an_iteration_of_the_poisoning_setting_touches_96_000_samples(real_data, monkeypatch):
    """90 (300 + 300 + 300) of the lower level and 15,000 of the upper one, so that 2e6 last for 21 iterations."""
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(real_data("mnist")))
    report = ["--trainer.callbacks=PoisoningReport", "--trainer.callbacks.steps=1"]
    run("--config", "poisoning/mnist_bsgm", "--trainer.max_steps=1", *report)
    module = torch.load(checkpoint(), weights_only=True)["state_dict"]
    assert int(module["oracles"][-1]) == 96_000
    norms = module["task.upper.delta"].flatten(1).norm(dim=1)
    assert float(norms.max()) <= 5 + 1e-5
    assert 0.4 < float((norms > 0).float().mean()) < 0.7  # 1 - exp(-0.6) of the images are among those drawn


LAYOUTS = {
    "omniglot": ("hdf5", "folders", "zips"),
    "miniimagenet": ("hdf5", "pickle", "images", "folders"),
    "tieredimagenet": ("hdf5", "pickle"),
}


@pytest.mark.parametrize("name", of_task("few_shot"))
def test_shipped_few_shot_configs_run(name, tmp_path, monkeypatch, capsys):
    """The configs of a data set take turns in the layouts of its files, from the file to the test."""
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(tmp_path / "data"))
    small = ["--data.queries=1", "--data.episodes_per_batch=1", "--data.val_episodes=1", "--data.test_episodes=2"]
    small += ["--model.lower_steps=1", "--model.evaluation_steps=1", "--trainer.max_steps=1", "--data.epoch_length=1"]
    if "resnet12" in name:
        small += ["--model.task.body.width=[8,8,8,8]", "--model.task.head.features=8"]
    data, _, _ = name.partition("/")[2].partition("_")
    if layouts := LAYOUTS.get(data):
        others = [other for other in of_task("few_shot") if f"/{data}_" in other]
        assert len(others) >= len(layouts)
        layout = layouts[others.index(name) % len(layouts)]
    if data == "omniglot":
        characters = [f"images_{part}/A{i}/character01" for part in ("background", "evaluation") for i in range(36)]
        files.omniglot(tmp_path / "data", layout, characters, drawings=7)
        small += ["--data.split=random", "--data.split_sizes=[24,24,24]"]
    elif data == "miniimagenet":
        files.mini_imagenet(tmp_path / "data" / "miniimagenet", layout)
    elif data == "tieredimagenet":
        files.tiered_imagenet(tmp_path / "data" / "tieredimagenet", layout)
    run("--config", name, *small, "--trainer.log_every_n_steps=1")
    folder = Path("runs") / name / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    measure = "mse" if "sinusoid" in name else "accuracy"
    assert [row for row in rows if row["train/upper_loss"]]
    assert [row for row in rows if row[f"val/{measure}"]]
    assert [row for row in rows if row[f"test/{measure}_ci95"]]  # tested at the end
    assert (folder / "adaptation.png").stat().st_size > 1000
    assert (folder / "episode.png").stat().st_size > 1000
    out = " ".join(capsys.readouterr().out.split())
    assert "queries of a class" in out
    assert "batch normalisation" in out


def test_the_checkpoint_that_was_best_in_validation_is_tested():
    """Here the first of three, as the largest error is asked for."""
    small = ["--data.episodes_per_batch=2", "--data.val_episodes=4", "--data.test_episodes=4", "--data.epoch_length=1"]
    choose = [f"--trainer.callbacks{end}" for end in ("=ModelCheckpoint", ".monitor=val/mse", ".mode=max")]
    run("--config", "few_shot/sinusoid_maml", *small, *choose, "--trainer.max_steps=3", "--trainer.log_every_n_steps=1")
    with (Path("runs") / "few_shot" / "sinusoid_maml" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (tested,) = [float(row["test/mse"]) for row in rows if row["test/mse"]]
    validated = [float(row["val/mse"]) for row in rows if row["val/mse"]]
    chosen = checkpoint()
    assert torch.load(chosen, weights_only=True)["global_step"] == 1 + validated.index(max(validated)) < 3
    run("test", "--ckpt_path", str(chosen), *choose, "--trainer.default_root_dir=again")
    with next(Path("again").rglob("metrics.csv")).open() as file:
        assert float(next(csv.DictReader(file))["test/mse"]) == tested


@pytest.mark.parametrize("name", [name for name in of_task("reweighting") if "/text_" not in name])
def test_shipped_reweighting_configs_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(tmp_path))
    files.mnist(tmp_path)
    files.mnist(tmp_path, "FashionMNIST")
    files.cifar_folders(tmp_path, train=120)
    text = Path(config_path(name)).read_text()
    small = ["--trainer.max_steps=2", "--data.epoch_length=2", "--data.lower_batch_size=16"]
    if "digits" not in name:
        small += ["--data.meta_per_class=2", "--data.class_samples=10"]
        small += ["--data.imbalance_factor=2"] if "imbalance_factor" in text else []
        small += ["--data.upper_batch_size=16"] if "upper_batch_size" in text else []
        small += ["--model.task.weights.samples=100"] if "SampleWeights" in text else []
    run("--config", name, *small)
    folder = Path("runs") / name / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/upper_loss"]]) == 2
    assert [row for row in rows if row["report/equal_weights/balanced_accuracy"]]
    picture = "source_weights.png" if "SourceWeights" in text else "weights.png"
    assert (folder / picture).stat().st_size > 1000
    assert "What the weights are worth" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in of_task("reweighting") if "/text_" in name])
def test_shipped_text_configs_run(name):
    model = "model.model" if any(word in name for word in ("lora", "bf16")) else "model"
    small = [f"--model.task.{model}.{size}" for size in ("width=8", "depth=1", "heads=2", "context=16")]
    small += ["--data.context=16", "--data.train_bytes=2000", "--data.val_bytes=600", "--data.test_bytes=600"]
    small += ["--data.epoch_length=2", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    run("--config", name, *small)
    folder = Path("runs") / name / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/upper_loss"]]) == 2
    assert [row for row in rows if row["val/bits_per_byte"] and row["val/source_weight_1"]]
    assert (folder / "source_weights.png").stat().st_size > 1000
    if "lora" in name:
        run("predict", "--ckpt_path", str(checkpoint()), "--trainer.default_root_dir", "predicted")
        (table,) = Path("predicted").rglob("predictions.csv")
        with table.open() as file:
            assert len(list(csv.DictReader(file))) == 2 * 124


@pytest.mark.parametrize("name", of_task("selection"))
def test_shipped_selection_configs_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(tmp_path))
    small = [
        "--trainer.max_steps=2",
        "--data.epoch_length=1",
        "--trainer.log_every_n_steps=1",
        *([] if name.endswith(("soba", "saba")) else ["--model.lower_steps=11"]),  # they have no lower loop
    ]
    batches = ["--data.lower_batch_size=16", "--data.upper_batch_size=16"]
    if "quadratic" in name:
        sizes = ["lower_samples=80", "upper_samples=60"]
        small += [f"--{part}.{size}" for part in ("data", "model.task") for size in sizes]
        small += ["--model.task.lower_dim=6", *(batches if "batch_size" in Path(config_path(name)).read_text() else [])]
    elif "logistic" in name:
        small += ["--data.samples=60", "--data.test_samples=20"]
    elif "text" in name:
        sizes = [f"--data.{part}_samples=60" for part in ("train", "val", "test")]
        small += [*sizes, "--data.vocabulary=500", "--data.words=8", "--model.task.features=500"]
    elif "newsgroups" in name:
        files.newsgroups(tmp_path, classes=20, documents=80)
        small += ["--model.task.features=284"]
    elif "ijcnn1" in name:
        files.libsvm(tmp_path / "ijcnn1.bz2", 60, 22, [-1, 1])
        files.libsvm(tmp_path / "ijcnn1.t.bz2", 60, 22, [1, -1], seed=1)
    else:
        files.libsvm(tmp_path / "covtype.bz2", 200, 54, range(1, 8))
        small += batches
    run("--config", name, *small)
    with (Path("runs") / name / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/upper_loss"]]) == 2
    measure = "value_gap" if "quadratic" in name else "accuracy"
    assert len([row for row in rows if row[f"val/{measure}"]]) == 2


@pytest.mark.parametrize("name", of_task("equilibrium"))
def test_shipped_equilibrium_configs_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(files.mnist(tmp_path / "data")))
    small = ["--data.batch_size=20", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--data.epoch_length=2"]
    small += ["--trainer.check_val_every_n_epoch=1", "--model.lower_steps=2", "--model.evaluation_steps=2"]
    if "mnist" in name:
        small += ["--data.val_samples=20"]
    if "stored_states" in Path(config_path(name)).read_text():
        small += ["--model.task.stored_states=100"]
    if "conv" in name:
        small += ["--model.task.cell.channels=2"]
    run("--config", name, *small)
    folder = Path("runs") / name / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/upper_loss"]]) == 2
    for measure in ("val/accuracy", "val/opt_metric", "val/hg_norm", "val/prox_map_norm", "test/accuracy"):
        assert len([row for row in rows if row[measure]]) == 1


SEARCHES = [name for name in of_task("nas") if "retrain" not in name]
RETRAININGS = [name for name in of_task("nas") if "retrain" in name]


@pytest.mark.parametrize("name", SEARCHES)
def test_shipped_searches_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(files.cifar_folders(tmp_path / "data", train=40, test=10)))
    small = ["--model.task.network.channels=4", "--model.task.network.layers=3", "--model.task.network.nodes=1"]
    small += ["--data.samples=20", "--data.lower_batch_size=4", "--data.upper_batch_size=4", "--data.epoch_length=2"]
    small += [f"--trainer.limit_val_batches={int('digits' in name)}"]
    run("--config", name, *small, "--trainer.max_steps=2", "--trainer.log_every_n_steps=1")
    folder = Path("runs") / name / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/upper_loss"]]) == 2
    if "digits" in name:
        assert [row for row in rows if row["val/accuracy"]]
        assert [row for row in rows if row["architecture/entropy_normal"]]
    found = Genotype.load(folder / "genotype.json")
    assert (folder / "genotype.png").stat().st_size > 1000
    assert (folder / "architecture.png").stat().st_size > 1000
    saved = torch.load(checkpoint(folder), weights_only=True)["state_dict"]
    assert saved["task.upper.normal"].shape == (2, 8)
    assert len(found.normal) == 1


@pytest.mark.parametrize("name", RETRAININGS)
def test_shipped_retrainings_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(files.cifar_folders(tmp_path / "data", train=40, test=10)))
    Genotype.random(3).save(tmp_path / "genotype.json")
    small = ["--model.channels=4", "--model.layers=3", "--data.train_samples=20", "--data.batch_size=10"]
    small += ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    run("--config", name, *small, f"--model.genotype={tmp_path / 'genotype.json'}")
    folder = Path("runs") / name / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/loss"]]) == 2
    (tested,) = [row for row in rows if row["test/accuracy"]]
    assert "test/accuracy" in capsys.readouterr().out
    path = str(checkpoint(folder))
    run("test", "--ckpt_path", path, "--trainer.default_root_dir", "tested")  # from the checkpoint alone
    with next(Path("tested").rglob("metrics.csv")).open() as file:
        (row,) = list(csv.DictReader(file))
    assert row["test/accuracy"] == tested["test/accuracy"]
    run("predict", "--ckpt_path", path, "--trainer.default_root_dir", "predicted")
    with next(Path("predicted").rglob("predictions.csv")).open() as file:
        columns = list(csv.DictReader(file))
    assert list(columns[0]) == ["label", "predicted"]


def test_a_search_goes_into_retraining(capsys):
    small = ["--model.task.network.channels=2", "--model.task.network.nodes=1", "--data.epoch_length=1"]
    run("--config", "nas/digits_darts", *small, "--data.samples=80", "--trainer.max_steps=1")
    given = str(next(Path("runs").rglob("genotype.json")))
    for genotype in (given, "DARTS_OUR4", "random"):
        root = f"--trainer.default_root_dir={Path(genotype).stem}"
        run("--config", "nas/digits_retrain", f"--model.genotype={genotype}", "--trainer.max_epochs=1", root)
    with pytest.raises(SystemExit):
        run("--config", "nas/digits_retrain", "--model.genotype=nowhere.json")
    assert "neither a file nor 'random' nor one of DARTS_V1" in capsys.readouterr().err


def test_only_bilevel_problems_are_checked(capsys):
    from bilevel_lightning.cli import check

    with pytest.raises(SystemExit) as end:
        check(["--config", "nas/digits_retrain"])
    assert end.value.code == 2
    assert "Retraining" in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_say_what_they_are(name):
    assert re.match(r"# \S.{20,}", Path(config_path(name)).read_text())


# The arguments.


def test_fit_and_the_default_config_are_implied():
    default = config_path("hyper_cleaning/digits_trhg")
    assert complete([]) == ["fit", "--config", default]
    assert complete(["--trainer.max_steps", "3"]) == ["fit", "--config", default, "--trainer.max_steps", "3"]
    assert complete(["test"]) == ["test", "--config", default]
    assert complete(["--config=hyper_cleaning/mnist_trhg"])[2] == config_path("hyper_cleaning/mnist_trhg")
    assert complete(["fit", "-c", str(TINY)]) == ["fit", "-c", str(TINY)]
    assert complete(["--data", "DigitsCleaning"]) == ["fit", "--data", "DigitsCleaning"]
    with pytest.raises(BilevelError, match="neither a file nor a shipped config; shipped are .*digits_trhg"):
        complete(["--config", "hyper_cleaning/nothing"])


def test_classes_go_by_short_names(capsys):
    with pytest.raises(SystemExit):
        fit(["--model", "RHG", "--model.dynamics", "Nesterov", "--model.dynamics.lr", "0.2", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    model = printed["model"]
    assert model["class_path"].endswith("RHG")
    assert model["init_args"]["dynamics"]["class_path"].endswith("Nesterov")
    assert model["init_args"]["dynamics"]["init_args"]["lr"] == 0.2
    assert model["init_args"]["task"]["init_args"]["samples"] == 600  # kept from the default config
    default = yaml.safe_load(Path(config_path("hyper_cleaning/digits_trhg")).read_text())
    assert printed["trainer"]["max_steps"] == default["trainer"]["max_steps"] != 100


def test_help_names_the_configs_and_the_settings(capsys):
    with pytest.raises(SystemExit) as end:
        fit(["--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "hyper_cleaning/mnist_trhg" in out
    assert "--model.help" in out
    with pytest.raises(SystemExit):
        fit(["fit", "--model.help", "TRHG"])
    out = " ".join(capsys.readouterr().out.split())
    assert "number K of last lower steps" in out
    assert "--model.dynamics" in out
    assert "optimizer of x" in out


def test_module_and_script_are_the_command_line():
    result = subprocess.run(
        [sys.executable, "-m", "bilevel_lightning", "--config", "nothing"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("bilevel-fit: error: --config nothing is neither")


# What can be wrong.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model.lower_stepz", "3"],
            "TRHG has no setting lower_stepz. bilevel-fit --model.help TRHG lists its settings.",
        ),
        (["--model.lower_steps", "many"], "Parser key \"lower_steps\": Expected a <class 'int'>. Got value: many"),
        (["--model.lower_steps", "0"], "lower_steps must be at least 1, got 0."),
        (["--model", "RGH"], "--model RGH names no class: did you mean RHG?"),
        (["--model.dynamics", "Momentun"], "--model.dynamics Momentun names no class: did you mean Momentum?"),
        (["--model.task", "Unheard"], "--model.task Unheard names no class: only classes of this package and torch"),
        (["--trainer.gradient_clip_val", "1"], "trainer.gradient_clip_val does not reach hypergradients"),
        (
            ["--config", "hyper_cleaning/digits_soba", "--model.lower_steps", "7"],
            "SOBA has no setting lower_steps, since it has no lower loop: it moves y by steps of lower_lr. bilevel-fit "
            "--model.help SOBA lists its settings.",
        ),
        (
            ["--config", "hyper_cleaning/digits_gpbgd", "--model.dynamics.lr", "7"],
            "GPBGD has no setting dynamics.lr, since it has no lower loop",
        ),
        (
            ["--model.task.sample", "7"],
            "HyperCleaning has no setting sample. bilevel-fit --model.task.help HyperCleaning lists its settings.",
        ),
        (["--model.truncation", "101"], "truncation K=101 must be between 1 and lower_steps T=100"),
        (["--model.dynamics.lr", "-1"], "Momentum.lr must be a positive number, got -1.0."),
        (["--model.upper_optimizer.lr", "-1"], "upper_optimizer: Invalid learning rate: -1"),
        (["--data.noise_rate", "1"], "data.noise_rate must be in [0, 1), got 1.0."),
        (["--data.train_samples", "1700"], "data.train_samples=1700 and data.val_samples=100 leave no test image"),
        (["--model.task.samples", "599"], "The task has 599 weights but the data 600 training samples"),
        (["--model", "Nothing"], "Nothing"),
        (["--ckpt_path", "nothing.ckpt"], "--ckpt_path nothing.ckpt does not exist."),
        (["--trainer.strategy", "nothing"], "You selected an invalid strategy name: `strategy='nothing'`."),
        (["--trainer.strategy", "fsdp"], "fsdp keeps a part of the parameters on each process"),
        (["--trainer.devices", "-5"], "`devices` selected with `CPUAccelerator` should be an int > 0."),
        (["--trainer.val_check_interval", "1000"], "`val_check_interval` (1000) must be less than or equal to"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval must be positive, got 0"),
        (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch must be positive, got 0"),
        (["--data", "DigitsCleaning"], "the following arguments are required: fit.model"),
        (["--trainer.default_root_dir", "/proc/nowhere"], "Cannot write to trainer.default_root_dir /proc/nowhere"),
        (
            ["--config", "hyper_cleaning/mnist_trhg", "--data.root", "nowhere", "--data.download", "false"],
            "MNISTCleaning found no complete data in nowhere/MNIST/raw, and data.download is false. Put train-images",
        ),
    ],
)
def test_mistakes_end_in_one_message(capsys, args, message):
    assert message in failure(capsys, *args)


def test_errors_that_are_nobodys_mistake_are_raised(monkeypatch):
    def broken(*args):
        return Trainer(max_steps="many")  # Lightning's complaint, but about what another one gave it

    monkeypatch.setattr(HyperCleaning, "lower_loss", broken)
    with pytest.raises((TypeError, ValueError)):
        run()


def test_a_config_of_a_future_version(capsys):
    config = yaml.safe_load(Path(config_path("hyper_cleaning/digits_trhg")).read_text())
    config["model"]["init_args"]["quantum"] = True
    Path("future.yaml").write_text(yaml.safe_dump(config))
    assert "TRHG has no setting quantum" in failure(capsys, "--config", "future.yaml")
    config = {"trainer": {"quantum": True}}
    Path("future.yaml").write_text(yaml.safe_dump(config))
    assert "quantum" in failure(capsys, "--config", "future.yaml")


def test_a_file_in_place_of_the_output_folder(capsys):
    Path("taken").write_text("")
    assert "Cannot write to trainer.default_root_dir taken" in failure(capsys, "--trainer.default_root_dir", "taken")


def test_errors_of_our_own_keep_their_traceback(monkeypatch):
    def broken(self, *args):
        raise ValueError("a bug")

    monkeypatch.setattr(RHG, "bilevel_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("--config", "hyper_cleaning/digits_trhg", "--config", str(TINY))


# Checkpoints.


OWN = """
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

class Own(LightningDataModule):
    def __init__(self, batches: int = 1):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader([{"lower": torch.zeros(1), "upper": torch.zeros(1)}] * self.batches, batch_size=None)

    val_dataloader = train_dataloader
"""


def test_a_data_module_of_ones_own_lies_in_the_checkpoint(monkeypatch, capsys):
    Path("own_data.py").write_text(OWN)
    monkeypatch.setenv("BILEVEL_ALLOW", "own_data")
    own = ["--data", "own_data.Own", "--data.batches", "2", "--trainer.max_steps", "2"]
    run("--config", "numerical/strongly_convex_rhg", *own, "--trainer.callbacks", "null")
    path = str(checkpoint("runs"))
    stored = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    assert stored == {"_class_path": "own_data.Own", "batches": 2}
    capsys.readouterr()
    run("validate", "--ckpt_path", path)
    assert "val/upper_loss" in capsys.readouterr().out


def test_a_checkpoint_without_settings_of_the_data(tmp_path, capsys):
    path = tmp_path / "python.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(SystemExit):
        fit(["test", "--ckpt_path", str(path)])
    assert "holds no settings of the data" in capsys.readouterr().err


def test_resume_test_validate_predict_and_load(capsys):
    small = ["--config", "hyper_cleaning/digits_trhg", "--config", str(TINY)]
    run(*small, "--trainer.default_root_dir", "first", "--model.lower_steps", "7")
    path = str(checkpoint("first"))

    module = RHG.load_from_checkpoint(path)  # bare
    assert module.lower_steps == 7
    assert module.truncation == 3
    assert module.dynamics.lr == 0.3

    # Nothing but the checkpoint: its own settings.
    run("--ckpt_path", path, "--trainer.max_steps", "4", "--trainer.default_root_dir", "second")
    second = RHG.load_from_checkpoint(checkpoint("second"))
    assert second.lower_steps == 7
    assert int(second.oracles[1]) == 4 * 7

    # The user's word counts, not the checkpoint's.
    args = ["--ckpt_path", path, "--trainer.max_steps", "4", "--trainer.default_root_dir", "third"]
    run(*args, "--model.lower_steps", "9")
    third = RHG.load_from_checkpoint(checkpoint("third"))
    assert third.lower_steps == 9
    assert int(third.oracles[1]) == 2 * 7 + 2 * 9

    capsys.readouterr()
    run("test", "--ckpt_path", path)
    assert "test/accuracy" in capsys.readouterr().out
    run("validate", "--ckpt_path", path)
    assert "val/auroc" in capsys.readouterr().out
    run("predict", "--ckpt_path", path, "--trainer.default_root_dir", "predicted")
    (table,) = Path("predicted").rglob("predictions.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "predicted", "weight"]
    assert [int(row["index"]) for row in rows] == list(range(len(module.task.upper.logits)))
    weights = torch.tensor([float(row["weight"]) for row in rows])
    torch.testing.assert_close(weights, torch.sigmoid(module.task.upper.logits.detach()))


def test_last_goes_on_from_the_newest_checkpoint_of_the_config(capsys):
    """The same command begins a run, and goes on with it as often as it is given."""
    again = ["--config", "hyper_cleaning/digits_trhg", "--config", str(TINY), "--ckpt_path=last"]
    for steps in (2, 3, 5):
        run(*again, f"--trainer.max_steps={steps}")
    folder = Path("runs/hyper_cleaning/digits_trhg")
    ends = [int(RHG.load_from_checkpoint(checkpoint(folder / f"version_{i}")).oracles[1]) for i in range(3)]
    assert ends == [2 * 5, 3 * 5, 5 * 5]
    capsys.readouterr()
    run("test", *again)
    assert "test/accuracy" in capsys.readouterr().out
    elsewhere = [*again, "--trainer.default_root_dir=elsewhere"]
    message = "--ckpt_path last: there is no checkpoint in elsewhere/hyper_cleaning/digits_trhg/version_*/checkpoints."
    assert message in failure(capsys, "test", *elsewhere)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_last_looks_where_a_callback_writes():
    args = [
        "--config", "hyper_cleaning/digits_trhg", "--config", str(TINY), "--ckpt_path", "last",
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=mine",
    ]  # fmt: skip
    run(*args)
    run(*args, "--trainer.max_steps=4")
    newest = max(Path("mine").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert int(RHG.load_from_checkpoint(newest).oracles[1]) == 4 * 5


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
def test_runs_that_write_nothing(mode):
    quiet = QUICK if mode == "fast_dev_run" else []  # barebones switches all of it off by itself
    fit(["--config", "hyper_cleaning/digits_trhg", "--config", str(TINY), f"--trainer.{mode}=true", *quiet])
    assert not list(Path().rglob("*.ckpt"))
    assert not list(Path().rglob("metrics.csv"))


def test_interrupted_run_goes_on_to_the_bit():
    """Minibatches, three of six iterations, a new start from the file in the middle of an epoch."""
    args = [
        "--config", "hyper_cleaning/digits_trhg", "--config", str(TINY), "--data.lower_batch_size", "16",
        "--data.upper_batch_size", "16", "--data.epoch_length", "4",
    ]  # fmt: skip
    save = [
        "--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "3",
        "--trainer.callbacks.save_top_k", "-1", "--trainer.callbacks.filename", "step{step}",
        "--trainer.callbacks.auto_insert_metric_name", "false",
    ]  # fmt: skip
    run(*args, *save, "--trainer.max_steps", "6", "--trainer.default_root_dir", "whole")
    (middle,) = Path("whole").rglob("step3.ckpt")
    (end,) = Path("whole").rglob("step6.ckpt")
    run(*args, *save, "--trainer.max_steps", "6", "--trainer.default_root_dir", "rest", "--ckpt_path", str(middle))
    (again,) = Path("rest").rglob("step6.ckpt")
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (end, again))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
