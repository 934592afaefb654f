"""moejax: mixtures in JAX.

    import moejax as mj
    layer = mj.MoE(mj.Linear(8), mj.TopK(k=2), mj.GLU(hidden=512, num_experts=8), losses=(mj.Balance(0.01), mj.ZLoss(1e-3)))

Every class of the library is found under its own name, `mj.<Name>`, and every room under its own: `mj.routing`, `mj.dispatch`,
`mj.experts`, `mj.layers`, `mj.models`, `mj.data`, `mj.tasks`, `mj.optim`, `mj.train`, `mj.serve`, `mj.analysis`. Names are imported
on first use, so that tools which only read configs start at once.
"""

from moejax.core.folders import lazy
from moejax.core.platforms import skip_absent_tpus

skip_absent_tpus()

__version__ = "0.1.0"

__getattr__, __dir__ = lazy(__name__)
