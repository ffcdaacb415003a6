import bz2

import files
import numpy as np
import pytest
import torch
from loops import trainer

from bilevel_lightning import AIDCG, BilevelError, Minibatches, Nesterov
from bilevel_lightning.datamodules import LIBSVMData, Newsgroups, SyntheticLinear, SyntheticText
from bilevel_lightning.datamodules.selection import SparseRows
from bilevel_lightning.sparse import Sparse
from bilevel_lightning.tasks import PenaltySelection


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def dense(inputs):
    return torch.from_numpy(inputs.matrix.toarray()) if isinstance(inputs, SparseRows) else inputs


# Generated data.


def test_synthetic_labels_follow_the_model():
    data = ready(SyntheticLinear(samples=400, features=3, noise=0.0, val_share=0.25, test_samples=50, regression=True))
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [300, 100, 50]
    assert data.classes is None
    w = torch.linalg.lstsq(data.train[0].double(), data.train[1].double()[:, None]).solution
    for inputs, labels in (data.train, data.val, data.test):
        torch.testing.assert_close(inputs.double() @ w, labels.double()[:, None], rtol=1e-4, atol=1e-5)
    signs = ready(SyntheticLinear(samples=400, features=3, noise=0.0, val_share=0.25, test_samples=50))
    assert torch.equal(signs.train[1], (data.train[1] > 0).long())
    assert torch.equal(signs.train[0], data.train[0])


def text(**settings):
    small = {"train_samples": 120, "val_samples": 90, "test_samples": 60, "vocabulary": 2000, "words": 20}
    return SyntheticText(**{"classes": 3, **small, **settings})


def test_text_is_sparse_scaled_and_zipfian():
    data, same, other = ready(text()), ready(text()), ready(text(seed=1))
    matrix = data.train[0].matrix
    assert matrix.shape == (120, 2000)
    assert matrix.nnz < 0.02 * 120 * 2000
    np.testing.assert_allclose(np.sqrt(matrix.multiply(matrix).sum(1)), 1, rtol=1e-5)
    used = np.sort(np.asarray((matrix > 0).sum(0)).ravel())[::-1]
    assert used[0] > 0.5 * 120 / 2  # a frequent word is in many documents
    assert (used <= 1).mean() > 0.7  # and most words in none or one
    assert torch.bincount(data.train[1]).tolist() == [40, 40, 40]
    assert (same.train[0].matrix != matrix).nnz == 0
    assert (other.train[0].matrix != matrix).nnz > 0
    assert not set(map(tuple, dense(data.val[0]).tolist())) & set(map(tuple, dense(data.train[0]).tolist()))


def test_topicality_is_what_tells_the_classes_apart():
    def accuracy(topicality):
        data = ready(text(topicality=topicality, train_samples=300, words=40))
        task = PenaltySelection(2000, "multinomial", 3, initial=-7.0)
        task.lower.weight.data.copy_(task.lower_solution((data.train[0][:], data.train[1]), steps=60))
        return float(task.metrics({"upper": (data.val[0][:], data.val[1])})["accuracy"])

    assert accuracy(0.0) < 0.5
    assert accuracy(0.5) > 0.9


def test_sparse_minibatches_train():
    data = text(lower_batch_size=16, upper_batch_size=8, epoch_length=20)
    task = PenaltySelection(2000, "multinomial", 3, initial=-7.0)
    seen = []
    loss = task.lower_loss
    task.lower_loss = lambda batch: seen.append(batch) or loss(batch)
    module = AIDCG(
        task=task,
        upper_optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
        dynamics=Nesterov(lr=1.0),
        lower_steps=5,
    )
    run = trainer(20)
    run.fit(module, datamodule=data)
    assert all(isinstance(inputs, Sparse) for inputs, _ in seen)
    assert {inputs.rows.shape[0] for inputs, _ in seen} == {16}
    assert float(run.callback_metrics["val/accuracy"]) > 0.6


def test_minibatches_hold_the_rows_of_their_labels():
    data = ready(text(lower_batch_size=16, epoch_length=1))
    run = trainer(1)
    run.strategy._lightning_module = AIDCG(task=PenaltySelection(2000, "multinomial", 3), lower_steps=3)
    data.trainer = run
    (batch,) = data.train_dataloader()
    assert isinstance(batch["lower"], Minibatches)
    rows = {tuple(row): int(label) for row, label in zip(dense(data.train[0]).tolist(), data.train[1], strict=True)}
    for inputs, labels in batch["lower"]:
        assert [rows[tuple(row)] for row in inputs.rows.to_dense().tolist()] == labels.tolist()
    assert batch["upper"][0].rows.shape == (90, 2000)


# LIBSVM files.


@pytest.mark.parametrize("name", ["ijcnn1.bz2", "ijcnn1.gz", "ijcnn1"])
def test_ijcnn1_comes_in_two_files(tmp_path, name):
    train, val = files.random_samples(40, 22, [-1, 1]), files.random_samples(30, 22, [1, -1], seed=1)
    files.write_libsvm(tmp_path / name, *train)
    files.write_libsvm(tmp_path / "ijcnn1.t.bz2", *val)
    data = ready(LIBSVMData(train=name, val="ijcnn1.t.bz2", test_share=0, root=str(tmp_path)))
    assert (data.features, data.classes, data.test) == (22, 2, None)
    for found, (inputs, labels) in ((data.train, train), (data.val, val)):
        torch.testing.assert_close(found[0].double(), torch.from_numpy(inputs), rtol=1e-6, atol=1e-6)
        assert found[1].tolist() == (labels > 0).astype(int).tolist()
    with pytest.raises(BilevelError, match="has no test samples"):
        data.test_dataloader()


def test_covtype_is_split_and_standardized(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(tmp_path))
    inputs, labels = files.random_samples(700, 54, range(1, 8))
    files.write_libsvm(tmp_path / "covtype.bz2", inputs, labels)
    data = ready(LIBSVMData(train="covtype.bz2", standardize=True))
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [448, 112, 140]
    assert (data.features, data.classes) == (54, 7)
    torch.testing.assert_close(data.train[0].mean(0), torch.zeros(54), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.train[0].std(0, correction=0), torch.ones(54), rtol=1e-4, atol=0)
    assert data.val[0].mean(0).abs().max() > 1e-3
    everything = torch.cat([part[0] for part in (data.train, data.val, data.test)])
    assert len(torch.unique(everything, dim=0)) == 700
    plain = ready(LIBSVMData(train="covtype.bz2"))
    scaled = (plain.val[0] - plain.train[0].mean(0)) / plain.train[0].std(0, correction=0)
    torch.testing.assert_close(data.val[0], scaled, rtol=1e-3, atol=1e-4)


def test_covtype_has_the_sizes_of_the_benchmark():
    """Those of the state-of-the-art comparison: 371,847 training and 92,962 validation samples."""
    from bilevel_lightning.datamodules.selection import Labelled, _split

    whole = Labelled(np.zeros((581_012, 1), np.int8), np.zeros(581_012, np.int8))
    rng = np.random.RandomState(2442)
    rest, test = _split(whole, 0.2, rng)
    train, val = _split(rest, 0.2, rng)
    assert [len(part.labels) for part in (train, val, test)] == [371_847, 92_962, 116_203]


def test_sparse_files_stay_sparse_and_are_scaled_without_centring(tmp_path):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 400)) * (rng.random((60, 400)) < 0.03)
    inputs[0, -1] = 1.0
    files.write_libsvm(tmp_path / "rcv1", inputs, np.arange(60) % 2)
    data = ready(LIBSVMData(train="rcv1", root=str(tmp_path), standardize=True))
    assert isinstance(data.train[0], SparseRows)
    stored = dense(data.train[0])
    deviation = stored.std(0, correction=0)
    torch.testing.assert_close(deviation[deviation > 0], torch.ones(int((deviation > 0).sum())), rtol=1e-4, atol=0)


def test_regression_keeps_the_numbers(tmp_path):
    inputs, _ = files.random_samples(50, 4, [0])
    files.write_libsvm(tmp_path / "numbers", inputs, inputs.sum(1))
    data = ready(LIBSVMData(train="numbers", root=str(tmp_path), regression=True))
    assert data.classes is None
    torch.testing.assert_close(data.train[0].sum(1), data.train[1], rtol=1e-4, atol=1e-4)


def test_a_missing_file_is_named_with_its_folder(tmp_path):
    with pytest.raises(BilevelError, match=f"ijcnn1.bz2 is not in {tmp_path}.*BILEVEL_DATA_DIR"):
        LIBSVMData(train="ijcnn1.bz2", root=str(tmp_path)).setup()


def test_files_that_do_not_fit(tmp_path):
    files.write_libsvm(tmp_path / "train", *files.random_samples(40, 5, [0, 1]))
    files.write_libsvm(tmp_path / "wide", *files.random_samples(40, 6, [0, 1]))
    files.write_libsvm(tmp_path / "other", *files.random_samples(40, 5, [0, 1, 7]))
    (tmp_path / "page.html").write_text("<html>not found</html>\n")
    (tmp_path / "half.bz2").write_bytes(bz2.compress(b"1 1:2.0\n" * 100)[:-8])
    (tmp_path / "nan").write_text("1 1:nan\n0 1:2\n1 1:3\n0 1:4\n" * 5)

    def fails(message, **settings):
        with pytest.raises(BilevelError, match=message):
            LIBSVMData(**{"train": "train", "root": str(tmp_path), **settings}).setup()

    fails("wide does not fit the LIBSVM format, or the 5 features of train", val="wide")
    fails("wide does not fit the LIBSVM format, or the 5 features of train", test="wide")
    fails("the validation samples have labels that no training sample has, such as .7", val="other")
    fails("the test samples have labels that no training sample has", test="other")
    fails("page.html does not fit the LIBSVM format", train="page.html")
    fails("half.bz2 does not fit the LIBSVM format", train="half.bz2")
    fails("hold NaN or Inf", train="nan")
    narrow = files.random_samples(40, 3, [0, 1])
    files.write_libsvm(tmp_path / "narrow", *narrow)  # trailing zeros are not written in this format
    data = ready(LIBSVMData(train="train", test="narrow", root=str(tmp_path)))
    assert data.test[0].shape == (40, 5)
    assert torch.equal(data.test[0][:, 3:], torch.zeros(40, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LIBSVMData(train="a", val_share=1.0), "val_share must lie between 0 and 1"),
        (lambda: LIBSVMData(train="a", test_share=-0.1), "test_share must lie between 0 and 1"),
        (lambda: SyntheticLinear(samples=0), "data.samples must be a positive"),
        (lambda: SyntheticLinear(noise=-1.0), "noise must not be negative"),
        (lambda: SyntheticText(classes=1), "classes must be between 2"),
        (lambda: SyntheticText(topicality=1.5), "topicality must be between 0 and 1"),
        (lambda: SyntheticText(words=0.5), "words must be at least 1"),
        (lambda: SyntheticText(vocabulary=0), "vocabulary must be a positive"),
        (lambda: Newsgroups(remove=("signatures",)), "remove must be of headers, footers and quotes"),
    ],
)
def test_impossible_settings(build, message):
    with pytest.raises(BilevelError, match=message):
        build()


# scikit-learn's newsgroups.


def test_newsgroups_are_read_from_scikit_learns_file(tmp_path):
    files.newsgroups(tmp_path, documents=60)
    data = ready(Newsgroups(root=str(tmp_path), download=False))
    assert data.classes == 3
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [30, 30, 30]
    assert torch.bincount(data.train[1]).tolist() == [10, 10, 10]
    torch.testing.assert_close(dense(data.train[0]).square().sum(1), torch.ones(30), rtol=1e-5, atol=0)
    with_headers = ready(Newsgroups(root=str(tmp_path), download=False, remove=()))
    assert with_headers.features > data.features  # the headers have words of their own


def test_missing_newsgroups(tmp_path):
    with pytest.raises(BilevelError, match=f"no data in {tmp_path}, and data.download is false.*20news-bydate_py3.pkz"):
        Newsgroups(root=str(tmp_path), download=False).prepare_data()
