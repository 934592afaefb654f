"""Ways to divide a budget among layers, by a table of what each amount costs in each layer.

`cost[l, k - 1]` is the loss of quality if layer l gets k, infinite where it cannot. The total to be made small is the sum over layers.
"""

import numpy as np
from jaxtyping import Float, Int

from moejax.core.errors import ConfigError

Cost = Float[np.ndarray, "l k"]
Amounts = Int[np.ndarray, "l"]


def total(cost: Cost, amounts: Amounts) -> float:
    """The sum of what each layer's amount costs."""
    return float(cost[np.arange(len(cost)), amounts - 1].sum())


def check(cost: Cost, budget: int, least: int) -> None:
    """Raises ConfigError if no amounts between `least` and what the layers can take sum to the budget."""
    most = np.isfinite(cost).sum(1)
    if least < 1 or (most < least).any():
        raise ConfigError(f"least={least} must lie between 1 and {most.min()}, what a layer can take")
    low, high = least * len(cost), int(most.sum())
    if not low <= budget <= high:
        raise ConfigError(
            f"budget={budget} must lie between {low} and {high}: {len(cost)} layers of at least {least}, and what they take at most"
        )


def exact(cost: Cost, budget: int, least: int = 1) -> Amounts:
    """The best amounts, by dynamic programming over layers and what is left of the budget; ties go to less for the later layer."""
    check(cost, budget, least)
    layers, most = cost.shape
    best = np.full((layers + 1, budget + 1), np.inf)  # of the first layers, with so much spent
    best[0, 0] = 0.0
    taken = np.zeros((layers + 1, budget + 1), int)
    for layer in range(layers):
        for spent in range(budget + 1):
            for k in range(least, min(most, spent) + 1):
                value = best[layer, spent - k] + cost[layer, k - 1]
                if value < best[layer + 1, spent]:
                    best[layer + 1, spent], taken[layer + 1, spent] = value, k
    amounts, left = np.zeros(layers, int), budget
    for layer in reversed(range(layers)):
        amounts[layer] = taken[layer + 1, left]
        left -= amounts[layer]
    return amounts


def drawn(cost: Cost, budget: int, rng: np.random.Generator, least: int = 1) -> Amounts:
    """Amounts at random: one more for a layer that can take it, until the budget is spent."""
    check(cost, budget, least)
    return _mended(np.full(len(cost), least), np.isfinite(cost).sum(1), budget, least, rng)


def evolved(
    cost: Cost, budget: int, rng: np.random.Generator, least: int = 1, population: int = 64, generations: int = 200
) -> Amounts:
    """Amounts by evolution (Chitty-Venkata et al. 2025, algorithm 2).

    Of a population of feasible vectors the better half are parents. A child takes each layer's amount from either of two parents; then
    one layer gets one more and another one less; then its sum is mended.
    """
    check(cost, budget, least)
    most = np.isfinite(cost).sum(1)
    people = [drawn(cost, budget, rng, least) for _ in range(population)]
    for _ in range(generations):
        people.sort(key=lambda amounts: total(cost, amounts))
        parents = people[: max(2, population // 2)]
        children = []
        while len(parents) + len(children) < population:
            one, other = (parents[i] for i in rng.choice(len(parents), 2, replace=False))
            child = np.where(rng.random(len(cost)) < 0.5, one, other)
            more, less = rng.integers(len(cost), size=2)
            child[more] += 1
            child[less] -= 1
            children.append(_mended(np.clip(child, least, most), most, budget, least, rng))
        people = parents + children
    return min(people, key=lambda amounts: total(cost, amounts))


def _mended(amounts: Amounts, most: Amounts, budget: int, least: int, rng: np.random.Generator) -> Amounts:
    """One more or one less for layers at random, until the sum is the budget."""
    amounts = amounts.copy()
    while (missing := budget - amounts.sum()) != 0:
        step = 1 if missing > 0 else -1
        free = np.flatnonzero(amounts < most if step > 0 else amounts > least)
        amounts[rng.choice(free)] += step
    return amounts
