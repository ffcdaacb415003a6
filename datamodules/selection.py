"""Data of linear models: generated, of scikit-learn's 20 newsgroups, of LIBSVM files; and bare sample numbers."""

import warnings
from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.datamodules.images import data_folder
from bilevel_lightning.datamodules.iterations import Whole
from bilevel_lightning.datamodules.levels import Samples, TwoLevelData
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.sparse import Sparse

DENSE = 0.05
"""Share of stored entries from which a sparse matrix is made dense: from there dense products are faster."""


class SparseRows:
    """The rows of a sparse matrix, gathered as `Sparse` on a device; all of them are made once.

    Args:
        matrix: scipy's CSR matrix, samples by features.
        device: where gathered rows lie. The matrix itself stays in the memory of the CPU.
    """

    def __init__(self, matrix: Any, device: torch.device | str = "cpu") -> None:
        self.matrix, self.device = matrix, torch.device(device)
        self._slices: dict[str, Sparse] = {}

    def __len__(self) -> int:
        rows: int = self.matrix.shape[0]
        return rows

    def to(self, device: torch.device | str) -> "SparseRows":
        """Returns the same rows for another device."""
        return self if torch.device(device) == self.device else SparseRows(self.matrix, device)

    def __getitem__(self, index: Tensor | slice) -> Sparse:
        if isinstance(index, Tensor):
            return self._made(self.matrix[index.cpu().numpy()])
        if str(index) not in self._slices:
            self._slices[str(index)] = self._made(self.matrix[index])
        return self._slices[str(index)]

    def _made(self, rows: Any) -> Sparse:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            parts = [
                torch.sparse_csr_tensor(
                    torch.from_numpy(m.indptr).long(),
                    torch.from_numpy(m.indices).long(),
                    torch.from_numpy(m.data),
                    size=m.shape,
                    check_invariants=False,
                ).to(self.device)
                for m in (rows, rows.T.tocsr())
            ]
        return Sparse(*parts)


class Labelled(NamedTuple):
    """Samples with labels.

    Attributes:
        inputs: samples by features, a numpy array or a scipy CSR matrix.
        labels: one for each sample: numbers for regression, else anything that numpy can sort.
    """

    inputs: Any
    labels: NDArray[Any]


class LinearData(TwoLevelData):
    r"""Base of the data modules for `PenaltySelection`: training (lower), validation (upper) and test samples.

    Batches are ``(inputs, labels)`` at both levels. Inputs stay sparse, minibatches included, where less than 5 % of
    the training entries are stored; others are made dense. Labels are class numbers in the order of the training
    labels, or numbers of the default type for regression.

    Args:
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: as in `TwoLevelData`.
        regression: whether labels are numbers. Default False.

    Attributes:
        train: inputs and labels of the lower level.
        val: those of the upper level.
        test: those of the test set, None where there is none.
        features: entries of a sample.
        classes: number of classes; None for regression.

    Raises:
        BilevelError: if labels of the validation or test set are not among the training set's, numbers of features
            differ, or an entry is not finite.
    """

    def __init__(
        self,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
        regression: bool = False,
    ) -> None:
        super().__init__(lower_batch_size, upper_batch_size, epoch_length, seed)
        self.regression = regression

    @abstractmethod
    def sources(self) -> tuple[Labelled, Labelled, Labelled | None]:
        """Returns training, validation and test samples."""

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "features"):
            return
        parts = self.sources()
        train = parts[0]
        classes = None if self.regression else np.unique(train.labels)
        names = ("training", "validation", "test")
        self.train, self.val, self.test = (
            None
            if part is None
            else self._tensors(part, name, train.inputs.shape[1], classes, _is_sparse(train.inputs))
            for name, part in zip(names, parts, strict=True)
        )
        self.classes = None if classes is None else len(classes)
        self.features: int = train.inputs.shape[1]

    def _tensors(
        self, part: Labelled, name: str, features: int, classes: NDArray[Any] | None, sparse: bool
    ) -> tuple[Any, Tensor]:
        inputs, labels = part
        origin = f"{type(self).__name__}: the {name} samples"
        if inputs.shape[1] != features:
            raise BilevelError(f"{origin} have {inputs.shape[1]} features, and the training samples {features}.")
        if inputs.shape[0] == 0:
            raise BilevelError(f"{origin} are none; change the sizes or shares of the split.")
        if classes is None:
            targets = torch.from_numpy(np.asarray(labels, float)).to(torch.get_default_dtype())
        else:
            if not np.isin(labels, classes).all():
                other = np.setdiff1d(labels, classes)[:3]
                raise BilevelError(f"{origin} have labels that no training sample has, such as {other.tolist()}.")
            targets = torch.from_numpy(np.searchsorted(classes, labels))
        values = inputs.data if sparse else inputs.toarray() if hasattr(inputs, "toarray") else inputs
        if not np.isfinite(values).all():
            raise BilevelError(f"{origin} hold NaN or Inf; repair or remove them.")
        kind = torch.get_default_dtype()
        if sparse:
            return SparseRows(inputs.astype(np.float64 if kind == torch.float64 else np.float32)), targets
        return torch.from_numpy(np.ascontiguousarray(values)).to(kind), targets

    def _whole(self, data: Any) -> tuple[Any, Tensor]:
        inputs, labels = data
        return (inputs[:] if isinstance(inputs, SparseRows) else inputs), labels

    @override
    def val_dataloader(self) -> Whole:
        return Whole({"lower": self._whole(self.train), "upper": self._whole(self.val)})

    @override
    def test_dataloader(self) -> Whole:
        if self.test is None:
            raise BilevelError(f"{type(self).__name__} has no test samples: give a test file or share.")
        return Whole({"lower": self._whole(self.train), "upper": self._whole(self.test)})

    @override
    def predict_dataloader(self) -> Whole:
        return Whole(self._whole(self.val if self.test is None else self.test))


class SyntheticLinear(LinearData):
    r"""Labels of a random linear model: b = a^T w + noise n, or whether that is positive.

    The entries of a, w and n are standard normal. With the defaults, the ``samples`` are the data of hypertorch's
    logistic regression, to the bit: numpy's generator with seed 1, and scikit-learn's split in halves. Test samples of
    the same w are drawn after them.

    Args:
        samples: training and validation samples together. Default 1000.
        features: entries of a sample. Default 20.
        noise: standard deviation of the noise. Default 0.1.
        val_share: share of validation samples. Default 0.5.
        test_samples: default 1000.
        regression: whether labels are b itself. Default False.
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: as in `TwoLevelData`. Default 1.

    Raises:
        BilevelError: if a setting is impossible.

    References:
        R. Grazzi, L. Franceschi, M. Pontil, S. Salzo. On the Iteration Complexity of Hypergradient Computation. ICML
        2020, with the code hypertorch.
    """

    def __init__(
        self,
        samples: int = 1000,
        features: int = 20,
        noise: float = 0.1,
        val_share: float = 0.5,
        test_samples: int = 1000,
        regression: bool = False,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 1,
    ) -> None:
        super().__init__(lower_batch_size, upper_batch_size, epoch_length, seed, regression)
        self.save_hyperparameters()
        self.samples = int(positive("data.samples", samples))
        self.number = int(positive("data.features", features))
        self.test_samples = int(positive("data.test_samples", test_samples))
        if noise < 0:
            raise BilevelError(f"data.noise must not be negative, got {noise}.")
        self.noise, self.val_share = noise, _share("val_share", val_share)

    @override
    def sources(self) -> tuple[Labelled, Labelled, Labelled]:
        from sklearn.model_selection import train_test_split  # takes a second to import, so only where it is needed

        rng = np.random.RandomState(self.seed)
        w = rng.randn(self.number)

        def drawn(n: int) -> Labelled:
            inputs = rng.randn(n, self.number)
            values = inputs @ w + self.noise * rng.randn(n)
            return Labelled(inputs, values if self.regression else (values > 0).astype(int))

        inputs, labels = drawn(self.samples)
        train, val, b_train, b_val = train_test_split(inputs, labels, test_size=self.val_share, random_state=rng)
        return Labelled(train, b_train), Labelled(val, b_val), drawn(self.test_samples)


class SyntheticText(LinearData):
    r"""Generated documents with the statistics of text: Zipf's law, many rare words, classes with words of their own.

    Word r of the vocabulary has a background frequency proportional to 1 / (r + 2.7) (Zipf-Mandelbrot). A class draws a
    share ``topicality`` of its words from a Zipf law over a random order of the vocabulary, its own, and the others
    from the background. The length of a document is geometric with mean ``words``. The inputs are tf-idf with the
    smoothed inverse document frequencies of the training set, scaled to unit length (scikit-learn's TfidfTransformer).

    Args:
        classes: default 20, that of the 20 newsgroups.
        train_samples: documents of the lower level. Default 5657, half of the newsgroups' training set.
        val_samples: documents of the upper level. Default 5657.
        test_samples: default 7532, the newsgroups' test set.
        vocabulary: number of words, the features. Default 100000.
        words: mean length of a document. Default 150.
        topicality: share of words from the class's own law, 0 to 1. Default 0.2.
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: as in `TwoLevelData`.

    Raises:
        BilevelError: if a setting is impossible.
    """

    def __init__(
        self,
        classes: int = 20,
        train_samples: int = 5657,
        val_samples: int = 5657,
        test_samples: int = 7532,
        vocabulary: int = 100_000,
        words: float = 150.0,
        topicality: float = 0.2,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(lower_batch_size, upper_batch_size, epoch_length, seed)
        self.save_hyperparameters()
        sizes = {"train_samples": train_samples, "val_samples": val_samples, "test_samples": test_samples}
        for name, value in {**sizes, "vocabulary": vocabulary}.items():
            positive(f"data.{name}", value)
        if not 2 <= classes <= train_samples:
            raise BilevelError(f"data.classes must be between 2 and data.train_samples, got {classes}.")
        if not 0 <= topicality <= 1:
            raise BilevelError(f"data.topicality must be between 0 and 1, got {topicality}.")
        if words < 1:
            raise BilevelError(f"data.words must be at least 1, got {words}.")
        self.sizes, self.number = tuple(sizes.values()), classes
        self.vocabulary, self.words, self.topicality = vocabulary, words, topicality

    @override
    def sources(self) -> tuple[Labelled, Labelled, Labelled]:
        from scipy.sparse import csr_matrix  # type: ignore[import-untyped]
        from sklearn.feature_extraction.text import TfidfTransformer

        rng = np.random.default_rng(self.seed)
        ranks = 1 / (np.arange(self.vocabulary) + 2.7)
        law = (ranks / ranks.sum()).cumsum()
        orders = [rng.permutation(self.vocabulary) for _ in range(self.number)]

        def drawn(n: int) -> Labelled:
            labels = rng.permutation(np.arange(n) % self.number)
            lengths = rng.geometric(1 / self.words, n)
            words = np.minimum(np.searchsorted(law, rng.random(lengths.sum())), self.vocabulary - 1)
            own = rng.random(len(words)) < self.topicality
            of_class = np.repeat(labels, lengths)
            for c, order in enumerate(orders):
                mine = own & (of_class == c)
                words[mine] = order[words[mine]]
            documents = np.repeat(np.arange(n), lengths)
            counts = csr_matrix((np.ones(len(words)), (documents, words)), shape=(n, self.vocabulary))
            return Labelled(counts, labels)

        train, val, test = (drawn(n) for n in self.sizes)
        scaled = TfidfTransformer().fit(train.inputs).transform
        weighted = [Labelled(scaled(part.inputs), part.labels) for part in (train, val, test)]
        return weighted[0], weighted[1], weighted[2]


class Newsgroups(LinearData):
    """The 20 newsgroups, as scikit-learn stores them: word counts of a document, scaled to unit length.

    Half of the training set, drawn with equal classes, is the lower level, the rest the upper level; the test set is
    scikit-learn's, of later dates.

    Args:
        root: folder of ``20news-bydate_py3.pkz``, scikit-learn's file, and of its cache of word counts; default: the
            environment variable ``BILEVEL_DATA_DIR``, else ``data``. Both are pickles: use only files that you trust.
        download: let scikit-learn fetch the missing file, with its checksum. Default True.
        remove: parts of a post to leave out: ``headers``, ``footers``, ``quotes``. Default all, as in hypertorch.
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: as in `TwoLevelData`; also of the split.

    Raises:
        BilevelError: if the file is missing and cannot be fetched, or ``remove`` is unknown.
    """

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        remove: tuple[str, ...] = ("headers", "footers", "quotes"),
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(lower_batch_size, upper_batch_size, epoch_length, seed)
        self.save_hyperparameters()
        if not {*remove} <= {"headers", "footers", "quotes"}:
            raise BilevelError(f"data.remove must be of headers, footers and quotes, got {list(remove)}.")
        self.root, self.download, self.remove = data_folder(root), download, tuple(remove)

    @override
    def prepare_data(self) -> None:
        self._fetch("train")

    def _fetch(self, subset: str) -> Labelled:
        from sklearn.datasets import fetch_20newsgroups_vectorized

        try:
            found = fetch_20newsgroups_vectorized(
                subset=subset, remove=self.remove, data_home=str(self.root), download_if_missing=self.download
            )
        except OSError as error:
            reason = f"downloading failed ({error})" if self.download else "data.download is false"
            raise BilevelError(
                f"Newsgroups found no data in {self.root}, and {reason}. Put scikit-learn's 20news-bydate_py3.pkz "
                "there, set data.root or the environment variable BILEVEL_DATA_DIR, or allow data.download."
            ) from error
        return Labelled(found.data.tocsr(), found.target)

    @override
    def sources(self) -> tuple[Labelled, Labelled, Labelled]:
        inputs, labels = self._fetch("train")
        train, val = _split(Labelled(inputs, labels), 0.5, np.random.RandomState(self.seed), stratify=True)
        return train, val, self._fetch("test")


class LIBSVMData(LinearData):
    r"""Samples in the LIBSVM format, ``label number:value number:value ...``, plain or packed as .gz or .bz2.

    covtype as in benchmark_bilevel: ``train: covtype.bz2``, ``standardize: true``, else the defaults, which give
    371,847 training, 92,962 validation and 116,203 test samples. ijcnn1: ``train: ijcnn1.bz2`` (49,990 samples),
    ``val: ijcnn1.t.bz2`` (91,701), ``test_share: 0``: there the benchmark's upper level is the official test set, so
    that nothing is left to test on. The files are those of the LIBSVM data page,
    https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/; nothing is downloaded.

    Args:
        train: file of the lower level, and of what is split off it.
        val: file of the upper level; None (default): a share of ``train``.
        test: file of the test set; None (default): a share of ``train``.
        root: folder of the files; default: the environment variable ``BILEVEL_DATA_DIR``, else ``data``.
        val_share: share of what is left of ``train`` without the test set. Default 0.2, as in the benchmark.
        test_share: share of ``train``, 0 for none. Default 0.2, as in the benchmark.
        standardize: subtract the mean of the training samples from each feature and divide by their standard deviation.
            Inputs that stay sparse are divided only. Default False.
        regression: whether labels are numbers. Default False.
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: as in `TwoLevelData`; also of the split. Default 2442, the benchmark's for covtype.

    Raises:
        BilevelError: if a file is missing or not in this format, or validation or test files do not fit the first.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        root: str | None = None,
        val_share: float = 0.2,
        test_share: float = 0.2,
        standardize: bool = False,
        regression: bool = False,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 2442,
    ) -> None:
        super().__init__(lower_batch_size, upper_batch_size, epoch_length, seed, regression)
        self.save_hyperparameters()
        self.files, self.root = (train, val, test), data_folder(root)
        self.val_share = _share("val_share", val_share)
        self.test_share = test_share if test_share == 0 else _share("test_share", test_share)
        self.standardize = standardize

    def _read(self, name: str, features: int | None = None) -> Labelled:
        from sklearn.datasets import load_svmlight_file

        path = self.root / name
        if not path.is_file():
            raise BilevelError(
                f"LIBSVMData: {name} is not in {self.root}. Put the file there (LIBSVM's data page has it), or set "
                "data.root or the environment variable BILEVEL_DATA_DIR."
            )
        try:
            return Labelled(*load_svmlight_file(str(path), n_features=features))
        except (ValueError, OSError, EOFError) as error:
            whose = "" if features is None else f", or the {features} features of {self.files[0]}"
            raise BilevelError(f"LIBSVMData: {path} does not fit the LIBSVM format{whose}: {error}") from error

    @override
    def sources(self) -> tuple[Labelled, Labelled, Labelled | None]:
        rng = np.random.RandomState(self.seed)
        train = self._read(self.files[0])
        features = train.inputs.shape[1]
        val, test = (None if name is None else self._read(name, features) for name in self.files[1:])
        if test is None and self.test_share:
            train, test = _split(train, self.test_share, rng)
        if val is None:
            train, val = _split(train, self.val_share, rng)
        if not self.standardize:
            return train, val, test
        return self._standardized(train, val, test)

    def _standardized(
        self, train: Labelled, val: Labelled, test: Labelled | None
    ) -> tuple[Labelled, Labelled, Labelled | None]:
        from sklearn.preprocessing import StandardScaler

        dense = not _is_sparse(train.inputs)
        scaler = StandardScaler(with_mean=dense).fit(train.inputs.toarray() if dense else train.inputs)

        def scaled(part: Labelled) -> Labelled:
            inputs = scaler.transform(part.inputs.toarray() if dense else part.inputs)
            return Labelled(inputs, part.labels)

        return scaled(train), scaled(val), None if test is None else scaled(test)


class SampleIndices(TwoLevelData):
    """Numbers of samples, ``(index,)`` at both levels, for tasks that hold their samples (`QuadraticSum`).

    Args:
        lower_samples: default 32768.
        upper_samples: default 1024.
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: as in `TwoLevelData`.

    Raises:
        BilevelError: if a number is not positive.
    """

    def __init__(
        self,
        lower_samples: int = 32768,
        upper_samples: int = 1024,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(lower_batch_size, upper_batch_size, epoch_length, seed)
        self.save_hyperparameters()
        self.lower_samples = int(positive("data.lower_samples", lower_samples))
        self.upper_samples = int(positive("data.upper_samples", upper_samples))

    @override
    def levels(self) -> tuple[Samples, Samples]:
        return (torch.arange(self.lower_samples),), (torch.arange(self.upper_samples),)

    @override
    def val_dataloader(self) -> Whole:
        lower, upper = self.levels()
        return Whole({"lower": lower, "upper": upper})

    @override
    def test_dataloader(self) -> Whole:
        return self.val_dataloader()


def _is_sparse(inputs: Any) -> bool:
    return hasattr(inputs, "nnz") and inputs.nnz < DENSE * inputs.shape[0] * inputs.shape[1]


def _share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise BilevelError(f"data.{name} must lie between 0 and 1, got {value}.")
    return value


def _split(data: Labelled, share: float, rng: Any, stratify: bool = False) -> tuple[Labelled, Labelled]:
    """Returns the data without a random share of them, and that share."""
    from sklearn.model_selection import train_test_split

    strata = data.labels if stratify else None
    rest, drawn, *labels = train_test_split(*data, test_size=share, random_state=rng, stratify=strata)
    return Labelled(rest, labels[0]), Labelled(drawn, labels[1])
