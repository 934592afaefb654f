"""Bottlenecks: small feed-forward experts, such as stand beside a layer (Houlsby et al. 2019; SMEAR, Muqeeth et al. 2023)."""

from moejax.core.initializers.usual import Normal
from moejax.core.params import Initializer
from moejax.experts.ffn import FFN, INITS
from moejax.experts.registry import Activation, banks


@banks.register("bottleneck", slots=INITS)
class Bottleneck(FFN):
    """`swish(x W_down + b_down) W_up + b_up` with a narrow hidden layer: an `FFN` with other defaults, which starts small."""

    activation: Activation = "silu"
    use_bias: bool = True
    init_in: Initializer = Normal(1e-2)
    init_out: Initializer = Normal(1e-2)
