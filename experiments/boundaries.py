"""How sure a look at the seeds must be: the level of each look of a schedule, so that all looks together err in 5 % of cases.

A claim is looked at several times, after `looks` seeds. Somebody who stops at the first look that pleases errs more often than each
look does, so each has a level of its own. The error is spent in proportion to seeds: after `n` of `N` seeds, n / N of it (Kim and
DeMets 1987, "Design and analysis of group sequential tests based on the type I error spending rate function", with rho = 1). This is
between Pocock's rule, which spends early, and O'Brien and Fleming's, which with few seeds never stops early.

`levels` says at which one-sided level Student's t test on all seeds so far is made at each look. They are wider than what is left to
be spent, because looks share seeds. They are found by simulating the t statistics of standard normal seeds (`simulate`); those of the
schedules that studies use are kept in `TABLE`, and `python -m experiments.boundaries` makes it again. The last digit is rounded down.
"""

import functools

import numpy as np

ERROR = 0.05  # of one verdict, whatever the number of looks
HEADLINE_LOOKS = (4, 6, 9, 13)
LOOKS = (4, 6)
PATHS = 4_000_000

# (looks, error) -> one-sided level of each look.
TABLE: dict[tuple[tuple[int, ...], float], tuple[float, ...]] = {
    ((4, 6), 0.05): (0.0331, 0.0291),
    ((4, 6), 0.025): (0.0166, 0.0131),
    ((4, 6, 9, 13), 0.05): (0.0153, 0.0119, 0.0173, 0.0254),
    ((4, 6, 9, 13), 0.025): (0.0076, 0.0054, 0.0078, 0.0114),
}


@functools.cache
def levels(looks: tuple[int, ...], error: float = ERROR) -> tuple[float, ...]:
    """One-sided level of the t test at each look, such that in `error` of the cases without an effect any of them finds one."""
    if len(looks) == 1:
        return (error,)
    return TABLE.get((looks, error)) or simulate(looks, error)


def spent(looks: tuple[int, ...], error: float = ERROR) -> tuple[float, ...]:
    """The error that may have been made up to each look."""
    return tuple(error * look / looks[-1] for look in looks)


def simulate(looks: tuple[int, ...], error: float = ERROR, paths: int = PATHS, seed: int = 0) -> tuple[float, ...]:
    """`levels` from `paths` sequences of seeds that have no effect."""
    levels = np.zeros(len(looks))
    p = p_values(looks, paths, seed)
    before = np.ones(paths, bool)  # not stopped yet
    done = 0.0
    for k, allowed in enumerate(spent(looks, error)):
        reach = np.sort(p[k][before])
        levels[k] = reach[int((allowed - done) * paths)]
        done = allowed
        before &= p[k] > levels[k]
    return tuple(float(np.floor(level * 1e4) / 1e4) for level in levels)


def p_values(looks: tuple[int, ...], paths: int, seed: int) -> np.ndarray:
    """One-sided p of the mean of standard normal seeds, `[look, path]`."""
    from scipy import stats

    rng = np.random.default_rng(seed)
    total, squares, drawn = np.zeros(paths), np.zeros(paths), 0
    found = []
    for look in looks:
        for _ in range(drawn, look):
            x = rng.standard_normal(paths)
            total += x
            squares += x * x
        drawn = look
        mean = total / look
        variance = (squares - look * mean * mean) / (look - 1)
        found.append(stats.t.sf(mean / np.sqrt(variance / look), look - 1))
    return np.stack(found)


def main() -> None:
    """Prints the table."""
    for looks in (LOOKS, HEADLINE_LOOKS):
        for error in (ERROR, ERROR / 2):
            print(f"    ({looks}, {error}): {simulate(looks, error)},")


if __name__ == "__main__":
    main()
