"""Query features stage by stage: a map of them, and how well classes separate.

Both need scikit-learn, an extra. Letters in shapes: S stages, M queries, C channels.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np

from detrelay.core.evaluation.tables import Bools, Floats, Ints

MOST_PROBED = 4000
MOST_MAPPED = 500
_PERPLEXITY = 30.0
_PROBE_STEPS = 100  # of the optimiser at most
_MAP_STEPS = 500
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class QueryFeatures:
    """Features of the queries matched in the last stage, traced through the stages.

    Attributes:
        values: float32 [S, M, C], the inputs of each stage's class scores.
        category: int64 [M], of the object that the query is matched to.
        image: int64 [M], ascending.
    """

    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    category: Ints
    image: Ints

    def spread(self, count: int) -> QueryFeatures:
        """At most `count` queries, evenly spaced over the images."""
        total = len(self.category)
        if total <= count:
            return self
        rows = np.linspace(0, total - 1, count).round().astype(np.int64)
        return QueryFeatures(self.values[:, rows], self.category[rows], self.image[rows])


@dataclass(frozen=True, slots=True)
class Separability:
    """How well a linear model separates classes by the features of each stage.

    Attributes:
        learned: queries that the models were fitted on.
        held_out: queries of other images that they were tested on.
        chance: share of the held-out queries in the most common class of the learned ones.
        right: [S], share of the held-out queries whose class is predicted correctly.
    """

    learned: int
    held_out: int
    chance: float
    right: list[float]


def is_available() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def separability(features: QueryFeatures) -> Separability | None:
    """Fit a linear model on the queries of half of the images, and test it on those of the others.

    The model is multinomial logistic regression with scikit-learn's default penalty, on features
    of mean 0 and variance 1 over the learned queries. At most `MOST_PROBED` queries take part; all
    stages get the same ones.

    Args:
        features: of the same queries in every stage.

    Returns:
        None if a half has no query, or the first half only one class.
    """
    features = features.spread(MOST_PROBED)
    learned = _half_of_images(features.image)
    classes, held_out = features.category[learned], features.category[~learned]
    names, counts = np.unique(classes, return_counts=True)
    if len(names) < 2 or not len(held_out):
        return None
    return Separability(
        learned=len(classes),
        held_out=len(held_out),
        chance=float((held_out == names[counts.argmax()]).mean()),
        right=[
            _score(values[learned], classes, values[~learned], held_out)
            for values in features.values.astype(np.float64)
        ],
    )


def _half_of_images(image: Ints) -> Bools:
    """Queries of a random but fixed half of the images."""
    images = np.unique(image)
    drawn = np.random.default_rng(_SEED).permutation(images)[: (len(images) + 1) // 2]
    return np.isin(image, drawn)


def _score(values: Floats, classes: Ints, asked: Floats, truth: Ints) -> float:
    from sklearn.linear_model import LogisticRegression

    mean, deviation = values.mean(axis=0), values.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    probe = LogisticRegression(max_iter=_PROBE_STEPS, tol=1e-2)
    probe.fit((values - mean) / scale, classes)
    return float(probe.score((asked - mean) / scale, truth))


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMaps:
    """Queries on a plane for each stage, close together if their features are similar.

    Attributes:
        places: float64 [S, M, 2].
        category: int64 [M].
    """

    places: Floats
    category: Ints


def feature_maps(features: QueryFeatures) -> FeatureMaps | None:
    """T-SNE of at most `MOST_MAPPED` queries, the same ones in every stage; None for fewer than 5.

    Reference:
        van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008.
    """
    features = features.spread(MOST_MAPPED)
    count = len(features.category)
    if count < 5:
        return None
    from sklearn.manifold import TSNE

    mapper = TSNE(
        perplexity=min(_PERPLEXITY, (count - 1) / 3),
        init="pca",
        max_iter=_MAP_STEPS,
        random_state=_SEED,
    )
    places = np.zeros((len(features.values), count, 2))
    for stage, values in enumerate(features.values):
        if values.std(axis=0).any():  # constant features have a single place
            places[stage] = mapper.fit_transform(values)
    return FeatureMaps(places, features.category)
