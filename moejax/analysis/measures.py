"""What routing tables say: pure NumPy, from counts of tokens by label and expert."""

import numpy as np
from jaxtyping import Float

Counts = Float[np.ndarray, "labels e"]


def mutual_information(counts: Counts) -> float:
    """Bits that a token's expert tells about its label: 0 where experts ignore it, at most the label's entropy.

    Args:
      counts: how often tokens of each label used each expert; soft shares count as parts. All zero gives 0.
    """
    joint = counts / max(float(counts.sum()), 1e-30)
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / apart[seen])).sum())


def specialisation(counts: Counts) -> float:
    """`mutual_information` as a share of the label's entropy: 0 if experts ignore the label, 1 if they tell it exactly.

    The same for any number of labels and any mixture of them, so that layers and data sets compare; nan with fewer than two labels.
    """
    labels = counts.sum(1)
    uncertainty = entropy(labels)
    return mutual_information(counts) / uncertainty if uncertainty > 0 else float("nan")


def entropy(weights: Float[np.ndarray, "*n"]) -> float:
    """Entropy in bits of what is proportional to `weights`."""
    share = weights[weights > 0] / max(float(weights.sum()), 1e-30)
    return float(-(share * np.log2(share)).sum())


def balance(load: Float[np.ndarray, "e"]) -> float:
    """Entropy of the load as a share of the largest: 1 if all experts are used alike, 0 if one takes everything."""
    return entropy(load) / np.log2(len(load)) if len(load) > 1 else 1.0


def preferences(counts: Counts) -> Counts:
    """How much likelier a label's tokens are to use an expert than all tokens are: 1 is indifference, 0 avoidance."""
    by_label = counts / np.maximum(counts.sum(1, keepdims=True), 1e-30)
    overall = counts.sum(0, keepdims=True) / max(float(counts.sum()), 1e-30)
    return np.divide(by_label, overall, out=np.zeros_like(by_label), where=overall > 0)


def favourites(counts: Float[np.ndarray, "v e"], expert: int, many: int = 8, least: float = 5.0) -> list[tuple[int, float]]:
    """The labels (token ids, say) that an expert is most preferred by, with their preference; rare labels are left out.

    Args:
      least: labels with a smaller count than this say nothing.
    """
    liking = np.where(counts.sum(1) >= least, preferences(counts)[:, expert], 0)
    order = np.argsort(-liking, kind="stable")[:many]
    return [(int(label), float(liking[label])) for label in order if liking[label] > 1]
